"""The layouts under test and the sizes of the tested model; plain data that both sides of a pool can import."""

from dataclasses import dataclass

import numpy

Arrays = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Sizes:
    """A small Qwen3 in which no two dimensions coincide: heads x head != hidden, odd vocabulary, grouped queries."""

    layers: int = 4
    hidden: int = 40
    ffn: int = 72
    heads: int = 4
    groups: int = 2
    head: int = 12
    vocab: int = 131
    rank: int = 3
    alpha: float = 7.0

    @property
    def query(self) -> int:
        """Rows of q."""
        return self.heads * self.head

    @property
    def qkv(self) -> int:
        """Rows of q, k and v together."""
        return (self.heads + 2 * self.groups) * self.head


SIZES = Sizes()

LEARNING_RATE, WEIGHT_DECAY, CLIP = 5e-3, 0.1, 0.5
STEPS = 4
EPSILON = 1e-4
"""Adam's. At 1e-8 the first update is lr x the sign of every gradient, also of those that are nothing but rounding: one
process and transformers then part from the second step on."""


@dataclass(frozen=True)
class Case:
    """One way to train the same model on the same rows.

    Attributes:
        world: processes; data parallelism takes what TP x PP leaves.
        virtual_layers: layers of a model chunk under interleaving.
        apart: experts computed one after another, not together.
        fused_mlp: fused forms over whole MLPs.
        recompute: "full", "block" (the first layer of a chunk), "selective" or None.
        ragged: micro-batches differ in length; else all are padded to one.
        packed: the rows of a micro-batch stand one behind the other, without padding.
        lora: train an adapter; else every weight.
        routers: train the routers whole, beside the adapter.
        steps: global batches to train on.
        dtype: of parameters; the reference is fp32.
        context: CP. expert, expert_tensor: EP, ETP (None: as TP).
        model: "qwen3", or a model with experts (`moe_reference.MODELS`).
        lookups: adapters on routers and token embeddings too.
        balance, z_loss: coefficients of the losses on routers; balance_rows: balance every row by itself.
        fault: what is broken on purpose (see `worker`).
    """

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_layers: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    fused: bool = True
    fused_mlp: bool = False
    apart: bool = False
    recompute: str | None = None
    ragged: bool = True
    packed: bool = False
    per_token: bool = False
    tied: bool = False
    lora: bool = True
    routers: bool = False
    steps: int = STEPS
    dtype: str = "float32"
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    model: str = "qwen3"
    lookups: bool = False
    balance: float = 0.0
    balance_rows: bool = False
    z_loss: float = 0.0
    fault: str | None = None

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def truth(self) -> "Case":
        """The case without what must not change the numbers."""
        kept = (
            "tied", "lora", "routers", "ragged", "per_token", "model", "lookups", "balance", "balance_rows", "z_loss",
        )  # fmt: skip
        return Case(**{name: getattr(self, name) for name in kept})

    def __str__(self) -> str:
        """As a test's name: "TP2 SP fused tied"."""
        said = [
            self.model if self.model != "qwen3" else "",
            f"TP{self.tensor}" if self.tensor > 1 or self.world == 1 else "",
            f"PP{self.pipeline}" if self.pipeline > 1 else "",
            "VPP2" if self.virtual_layers else "",
            "SP" if self.sequence_parallel else "",
            f"CP{self.context}" if self.context > 1 else "",
            f"EP{self.expert}" if self.expert > 1 else "",
            f"ETP{self.expert_tensor}" if self.expert_tensor else "",
            f"DP{self.replicas}" if self.replicas > 1 else "",
            "distributed-optimizer" if self.distributed_optimizer else "",
            "overlap" if self.overlap else "",
            "full-tuning" if not self.lora else "fused" if self.fused else "modular",
            "mlp" if self.fused_mlp else "",
            "apart" if self.apart else "",
            "routers" if self.routers else "",
            f"recompute-{self.recompute}" if self.recompute else "",
            "lookups" if self.lookups else "",
            "packed" if self.packed else "" if self.ragged else "padded",
            "per-token" if self.per_token else "",
            "tied" if self.tied else "",
            ("row-" if self.balance_rows else "") + "balance" if self.balance else "",
            "z-loss" if self.z_loss else "",
            "" if self.dtype == "float32" else self.dtype,
            self.fault or "",
        ]
        return "-".join(word for word in said if word)
