"""The programs that build the live model, each composed of groups of options."""

from dataclasses import dataclass, fields
from typing import ClassVar

from mindspeed_llm.arguments.checkpoint import CheckpointOptions, LoadOptions
from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.arguments.device import DeviceOptions
from mindspeed_llm.arguments.evaluation import EvaluationOptions
from mindspeed_llm.arguments.experts import ExpertOptions
from mindspeed_llm.arguments.generation import GenerationOptions
from mindspeed_llm.arguments.logging import LoggingOptions
from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.arguments.model import ModelOptions
from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.arguments.parallel import ParallelOptions
from mindspeed_llm.arguments.plan import PlanOptions
from mindspeed_llm.arguments.preference import PreferenceOptions
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.arguments.rows import RowOptions
from mindspeed_llm.arguments.schema import Program, group, option
from mindspeed_llm.arguments.sources import SourceOptions
from mindspeed_llm.arguments.tokenizer import TokenizerOptions
from mindspeed_llm.arguments.training import TrainingOptions
from mindspeed_llm.errors import UsageError


@dataclass
class PosttrainOptions(Program):
    """Tune a model, whole or with LoRA, from a Megatron checkpoint or straight from an HF folder.

    Start it with torchrun for more than one process: tensor- times pipeline-parallel size divides their number, and
    the quotient is the data-parallel size.
    """

    SCRIPT: ClassVar[str] = "posttrain_gpt.py"
    EXAMPLE: ClassVar[str] = """
torchrun --nproc_per_node 2 posttrain_gpt.py --stage sft --finetune --bf16 \\
    --load ./model_weights/qwen3_mcore/ --save ./ckpt/qwen3_lora --data-path ./finetune_dataset/alpaca \\
    --tokenizer-name-or-path ./model_from_hf/qwen3_hf --pipeline-model-parallel-size 2 \\
    --lora-r 16 --lora-alpha 32 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 --lora-fusion \\
    --micro-batch-size 4 --global-batch-size 16 --train-iters 2000 --lr 1.25e-5 --no-pad-to-seq-lengths
"""

    device: DeviceOptions = group(DeviceOptions)
    model: ModelOptions = group(ModelOptions)
    parallel: ParallelOptions = group(ParallelOptions)
    tokenizer: TokenizerOptions = group(TokenizerOptions)
    data: DataOptions = group(DataOptions)
    sources: SourceOptions = group(SourceOptions)
    rows: RowOptions = group(RowOptions)
    training: TrainingOptions = group(TrainingOptions)
    preference: PreferenceOptions = group(PreferenceOptions)
    experts: ExpertOptions = group(ExpertOptions)
    optimizer: OptimizerOptions = group(OptimizerOptions)
    lora: LoraOptions = group(LoraOptions)
    checkpoint: CheckpointOptions = group(CheckpointOptions)
    logging: LoggingOptions = group(LoggingOptions)
    planning: PlanOptions = group(PlanOptions)

    @property
    def prefers(self) -> bool:
        """Whether pairs of answers are learnt from."""
        return self.training.stage == "dpo"

    @property
    def raw_rows(self) -> bool:
        """Whether rows are named as they are, to be prepared inside training."""
        return self.rows.input is not None or bool(self.sources.dataset)

    def check(self) -> None:
        """Raise UsageError for rows named twice, and for options of another stage or of raw rows without them."""
        self._check_stage()
        prepared = "--data-path" if self.data.data_path else "--train-data-path"
        if self.raw_rows and (self.data.data_path or self.data.train_data_path):
            named = "--dataset" if self.sources.dataset else "--input"
            raise UsageError(f"{named} names raw rows and {prepared} prepared ones; give one of the two")
        if self.rows.input is not None and self.sources.dataset:
            raise UsageError("--input and --dataset both name the rows; give one of the two")
        if self.raw_rows:
            return
        # upstream's training scripts repeat these of preprocessing; the data's own report decides
        repeated = {"neat_pack", "pack", "dataset_additional_keys"}
        for group_ in (self.rows, self.sources):
            for one in fields(group_):
                if one.name not in repeated and getattr(group_, one.name) != getattr(type(group_)(), one.name):
                    raise UsageError(
                        f"--{one.name.replace('_', '-')} is about raw rows, which --dataset or --input name; "
                        f"{prepared} names rows that are prepared already"
                    )

    def _check_stage(self) -> None:
        """Raise UsageError for options that the stage does not have."""
        if not self.prefers:
            given = [*self.preference.given(), *(["--is-pairwise-dataset"] if self.data.is_pairwise_dataset else [])]
            if given:
                raise UsageError(f"{given[0]} belongs to --stage dpo, and the stage is {self.training.stage}")
            return
        if self.data.is_instruction_dataset:
            raise UsageError("--is-instruction-dataset: --stage dpo reads pairs of answers; leave it out")
        if self.training.calculate_per_token_loss:
            raise UsageError("--calculate-per-token-loss: --stage dpo weighs pairs, not tokens; leave it out")


@dataclass
class LiveProgram(Program):
    """What every program that runs a tuned model shares; some options are only read from upstream's scripts."""

    device: DeviceOptions = group(DeviceOptions)
    model: ModelOptions = group(ModelOptions)
    parallel: ParallelOptions = group(ParallelOptions)
    tokenizer: TokenizerOptions = group(TokenizerOptions)
    lora: LoraOptions = group(LoraOptions)
    checkpoint: LoadOptions = group(LoadOptions)
    seq_length: int | None = option(
        None, help="Longest prompt and answer together; left out, the model's own limit.", unit="tokens"
    )
    micro_batch_size: int = option(1, help="Sequences run at once where a task allows it.", unit="sequences")
    seed: int = option(1234, help="Seed of sampling.")
    bf16: bool = option(False, help="Compute in bfloat16; left out, in the type of the checkpoint's weights.")
    fp32: bool = option(False, help="Compute in float32; left out, in the type of the checkpoint's weights.")

    def check(self) -> None:
        """Raise UsageError for two precisions at once and lengths below one."""
        if self.bf16 and self.fp32:
            raise UsageError("--bf16 and --fp32 contradict each other; give one of the two")
        for name in ("seq_length", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


@dataclass
class InferenceOptions(LiveProgram):
    """Answer questions or chat with a model, or with a base and its LoRA adapter.

    The adapter's rank, scale and targets, the prompt template and the thinking mode come from the checkpoint.
    """

    SCRIPT: ClassVar[str] = "inference.py"
    EXAMPLE: ClassVar[str] = """
torchrun --nproc_per_node 1 inference.py --load ./model_weights/qwen3_mcore/ --lora-load ./ckpt/qwen3_lora \\
    --tokenizer-name-or-path ./model_from_hf/qwen3_hf --prompt "Who are you?"
"""

    generation: GenerationOptions = group(GenerationOptions)


@dataclass
class EvaluateOptions(LiveProgram):
    """Score a model, or a base with its LoRA adapter, on benchmarks given as local files."""

    SCRIPT: ClassVar[str] = "evaluation.py"
    EXAMPLE: ClassVar[str] = """
torchrun --nproc_per_node 1 evaluation.py --task mmlu --task-data-path ./mmlu/data/test \\
    --load ./model_weights/qwen3_mcore/ --lora-load ./ckpt/qwen3_lora \\
    --tokenizer-name-or-path ./model_from_hf/qwen3_hf --output-path ./mmlu.json
"""

    evaluation: EvaluationOptions = group(EvaluationOptions)


PROGRAMS: dict[str, type[Program]] = {
    program.SCRIPT: program
    for program in (ConvertOptions, PreprocessOptions, PosttrainOptions, InferenceOptions, EvaluateOptions)
}
