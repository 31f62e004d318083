"""What a plan is made for: a model, what of it is trained, how it is spread, and the rows of a step."""

from dataclasses import dataclass

from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.models.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FULL_PRECISION = 4  # bytes of a master copy, a moment, a gradient in its buffer


@dataclass(frozen=True)
class Job:
    """A training job at one layout.

    Attributes:
        model: dimensions. layout: TP, PP, VPP, EP, ETP and the layers of each stage.
        cards: processes, one on each card. context: CP.
        sequence_parallel: activations between TP regions are cut along the sequence.
        dtype: of weights and activations, as torch names it.
        lora: settings of the adapter; None in full tuning.
        fused: adapters in the fused form. fused_mlp: whole MLPs in one function.
        experts_apart: experts run one after another, not together.
        recompute: "full", "selective" or None. recompute_method: "uniform" or "block" of full recomputation.
        recompute_layers: layers of a group (uniform), or recomputed layers of a chunk (block).
        distributed_optimizer: its state is spread over data parallelism. overlap_param_gather: parameters are gathered
            while the next forward pass runs.
        pairs: rows are the two answers of pairs (DPO), and a pass without gradients, adapters off, comes before the
            step's own.
        micro_batch: rows of a micro-batch. micro_batches: of a step, on one replica.
        length: tokens of a row, padding included, over all CP ranks: the longest for memory, the mean for time.
        rows: tokens of each row within a row, where those of a micro-batch stand one behind the other in one sequence
            (`--padding-free`, `--neat-pack`): the longest for memory, the mean for time. None where they do not.
        trained: share of the tokens that have a label.
        accelerator: norms are one kernel and the optimizer updates all parameters in one call; on a CPU neither is so.
    """

    model: ModelConfig
    layout: Layout
    cards: int = 1
    context: int = 1
    sequence_parallel: bool = False
    dtype: str = "float32"
    lora: LoraSettings | None = None
    fused: bool = False
    fused_mlp: bool = False
    experts_apart: bool = False
    recompute: str | None = None
    recompute_method: str | None = None
    recompute_layers: int | None = None
    distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    pairs: bool = False
    micro_batch: int = 1
    micro_batches: int = 1
    length: int = 1
    rows: int | None = None
    trained: float = 1.0
    accelerator: bool = False

    @property
    def replicas(self) -> int:
        """Data-parallel size: copies of the model that read different rows."""
        return self.cards // (self.layout.tp * self.layout.pp * self.context)

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return BYTES[self.dtype]

    @property
    def adapter_element(self) -> int:
        """Bytes of an element of the adapter."""
        return self.element if self.lora is None or self.lora.dtype == "auto" else BYTES[self.lora.dtype]

    @property
    def trains_head(self) -> bool:
        """Whether the output layer has a gradient."""
        name = "embedding.word_embeddings" if self.model.tie_word_embeddings else "output_layer"
        return self.lora is None or self.lora.saves(name)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a CP rank, before sequence parallelism cuts them."""
        return self.micro_batch * -(-self.length // self.context)

    @property
    def sp(self) -> int:
        """Parts into which sequence parallelism cuts activations between TP regions."""
        return self.layout.tp if self.sequence_parallel else 1

    @property
    def expert_replicas(self) -> int:
        """Data-parallel size of experts' parameters."""
        return self.cards // (self.layout.etp * self.layout.ep * self.layout.pp)
