"""One adapted layer or MLP as the cost tests want it, and what was seen of it; readable without megatron-core."""

from collections import Counter
from dataclasses import dataclass, field, replace

from tests.distributed.cases import Arrays
from tests.distributed.collectives import Seen


@dataclass(frozen=True)
class Layer:
    """An adapted layer under test.

    Attributes:
        kind: "column", "row" or "mlp".
        tensor: processes it is cut over. sequence_parallel, expert: of the base layer.
        fused: the fused form, else the modular one.
        chunk_bytes: least bytes of a chunk; 1 cuts as often as is ever done.
        dropout: on the adapter's input. dtype: of everything.
        without: case taken out of the table of fused forms.
        input_grad: whether the input asks for a gradient.
    """

    kind: str
    tensor: int = 1
    sequence_parallel: bool = False
    expert: bool = False
    fused: bool = True
    chunk_bytes: int = 1 << 20
    dropout: float = 0.0
    dtype: str = "float32"
    without: str | None = None
    input_grad: bool = True
    rows: int = 3
    length: int = 6
    inputs: int = 10
    outputs: int = 14
    ffn: int = 8
    rank: int = 4
    scaling: float = 1.75

    @property
    def case(self) -> str:
        """Its key in the table of fused forms."""
        if self.expert:
            return "expert"
        if self.tensor == 1:
            return "mlp_single" if self.kind == "mlp" else "single"
        return f"{self.kind}_sp" if self.sequence_parallel else self.kind

    @property
    def modular(self) -> "Layer":
        """The same in the modular form."""
        return replace(self, fused=False)

    def __str__(self) -> str:
        words = [self.kind, self.case, "" if self.fused else "modular", f"chunks-{self.chunk_bytes}"]
        words += [f"dropout-{self.dropout}" if self.dropout else "", "" if self.input_grad else "first-layer"]
        return "-".join(word for word in words if word)


@dataclass
class Cost:
    """What one pass did on a rank.

    Attributes:
        collectives: (kind, group, bytes) -> how often.
        flops: of matrix products, 2 per multiply-add.
        pointwise: elements written by element-wise additions and multiplications.
    """

    collectives: Seen = field(default_factory=Counter)
    flops: int = 0
    pointwise: int = 0


@dataclass
class Report:
    """One rank's report.

    Attributes:
        tensors: out, dx, and the adapters' gradients, this rank's shares.
        forward, backward: costs.
        saved: bytes kept for the backward pass, parameters aside.
        trace: ("issue" | "wait", number of the asynchronous collective) and ("compute", -1), in order.
        masks: dropout factors of the layer's adapters in the order drawn.
    """

    tensors: Arrays
    forward: Cost
    backward: Cost
    saved: int
    trace: list[tuple[str, int]]
    masks: list[Arrays] = field(default_factory=list)
