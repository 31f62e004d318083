"""How the model and the batch are divided over processes."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class ParallelOptions:
    """Parallel layout."""

    tensor_model_parallel_size: int = option(
        1, help="Processes over which each layer is cut (TP). Any checkpoint loads at any TP.", unit="processes"
    )
    pipeline_model_parallel_size: int = option(
        1, help="Stages into which the layers are grouped (PP); must divide the number of layers.", unit="stages"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, help="Layers per interleaved chunk; several chunks per stage (VPP) shorten the pipeline's bubble."
    )
    sequence_parallel: bool = option(
        False, help="Cut the sequence over the TP processes outside the matrix products; has no effect at TP 1."
    )
    context_parallel_size: int = option(
        1,
        help="Processes over which a sequence is cut (CP), in training; each has an early and a late piece. Long rows "
        "of a packed sequence are cut each for itself.",
    )
    expert_model_parallel_size: int = option(
        1, help="Processes over which experts are spread (EP); must divide the number of experts.", unit="processes"
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        help="Processes over which each expert is cut (ETP); left out, the tensor-parallel size.",
        unit="processes",
    )
    use_distributed_optimizer: bool = option(
        False, help="Spread the optimizer's state over the data-parallel processes; same numbers, less memory."
    )
    overlap_grad_reduce: bool = option(False, help="Reduce gradients over data parallelism during the backward pass.")
    overlap_param_gather: bool = option(
        False, help="Gather updated parameters during the next forward pass; needs --use-distributed-optimizer."
    )

    def check(self) -> None:
        """Raise UsageError for sizes that are not supported and options that need another one."""
        sizes = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
        for name in (f"{one}_parallel_size" for one in sizes):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        layers = self.num_layers_per_virtual_pipeline_stage
        if layers is not None and self.pipeline_model_parallel_size < 2:
            raise UsageError(
                f"--num-layers-per-virtual-pipeline-stage {layers} needs --pipeline-model-parallel-size of 2 or more, "
                f"got {self.pipeline_model_parallel_size}"
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise UsageError("--overlap-param-gather needs --use-distributed-optimizer")
