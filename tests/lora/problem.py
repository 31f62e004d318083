"""The adapter tests' plain data, readable without megatron-core."""

from dataclasses import dataclass

from tests.distributed.cases import Arrays


@dataclass(frozen=True)
class Linear:
    """One adapted linear layer: "column" splits its outputs over TP, "row" its inputs."""

    kind: str
    tensor: int = 1
    sequence_parallel: bool = False
    fused: bool = True
    bias: bool = True
    skip_bias_add: bool = False
    scaling: float = 1.75

    def __str__(self) -> str:
        """As a test's name."""
        words = [
            f"{self.kind}-TP{self.tensor}",
            "SP" if self.sequence_parallel else "",
            "fused" if self.fused else "modular",
            "bias" if self.bias else "",
            "skip-bias-add" if self.skip_bias_add else "",
        ]
        return "-".join(word for word in words if word)


@dataclass(frozen=True)
class Outcome:
    """One rank's tensors: out [s, b, o], bias (where its addition is left to others), dx, da, db."""

    tensors: Arrays
