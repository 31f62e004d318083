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


@dataclass(frozen=True)
class Case:
    """One way to train the same model on the same rows.

    Attributes:
        world: processes; data parallelism takes what TP x PP leaves.
        virtual_layers: layers of a model chunk under interleaving.
        fused_mlp: fused forms over whole MLPs.
        recompute: "full", "selective" or None.
        ragged: micro-batches differ in length; else all are padded to one.
        lora: train an adapter; else every weight.
        steps: global batches to train on.
        dtype: of parameters; the reference is fp32.
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
    recompute: str | None = None
    ragged: bool = True
    per_token: bool = False
    tied: bool = False
    lora: bool = True
    steps: int = STEPS
    dtype: str = "float32"
    fault: str | None = None

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tensor * self.pipeline)

    def __str__(self) -> str:
        """As a test's name: "TP2 SP fused tied"."""
        said = [
            f"TP{self.tensor}" if self.tensor > 1 or self.world == 1 else "",
            f"PP{self.pipeline}" if self.pipeline > 1 else "",
            "VPP2" if self.virtual_layers else "",
            "SP" if self.sequence_parallel else "",
            f"DP{self.replicas}" if self.replicas > 1 else "",
            "distributed-optimizer" if self.distributed_optimizer else "",
            "overlap" if self.overlap else "",
            "full-tuning" if not self.lora else "fused" if self.fused else "modular",
            "mlp" if self.fused_mlp else "",
            f"recompute-{self.recompute}" if self.recompute else "",
            "" if self.ragged else "padded",
            "per-token" if self.per_token else "",
            "tied" if self.tied else "",
            "" if self.dtype == "float32" else self.dtype,
            self.fault or "",
        ]
        return "-".join(word for word in said if word)
