"""Which rank holds which layer, and what its folder is called.

A *stage* is one pipeline rank; with virtual stages each holds several *chunks* of consecutive layers. Layers are
handed out chunk by chunk, the outer loop over virtual stages and the inner one over pipeline ranks.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mindspeed_llm.errors import UsageError

RANK_FOLDER = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
CHECKPOINT_FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Layout:
    """Tensor and pipeline parallel sizes, and how many layers each chunk holds.

    Attributes:
        tp: tensor parallel size.
        pp: pipeline parallel size.
        counts: `counts[vp][pp]` layers of each chunk.
    """

    tp: int
    pp: int
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, num_layers: int, tp: int = 1, pp: int = 1, layers_per_virtual_stage: int | None = None) -> "Layout":
        """Equal chunks.

        Raises:
            UsageError: a size is not positive or the layers do not divide.
        """
        for flag, value in (("tensor", tp), ("pipeline", pp)):
            if value < 1:
                raise UsageError(f"{flag} parallel size {value} is not positive")
        if num_layers % pp:
            raise UsageError(f"{num_layers} layers are not divisible by pipeline parallel size {pp}")
        chunk = layers_per_virtual_stage or num_layers // pp
        if chunk < 1 or (num_layers // pp) % chunk:
            raise UsageError(
                f"{num_layers // pp} layers per pipeline stage are not divisible by {chunk} layers per virtual stage"
            )
        virtual = num_layers // pp // chunk
        if virtual > 1 and pp == 1:
            raise UsageError("virtual pipeline stages need a pipeline parallel size above 1, which is 1")
        return cls(tp, pp, ((chunk,) * pp,) * virtual)

    @property
    def vp(self) -> int:
        """Chunks per pipeline rank."""
        return len(self.counts)

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return sum(sum(row) for row in self.counts)

    @property
    def layers_per_virtual_stage(self) -> int | None:
        """As `--num-layers-per-virtual-pipeline-stage` gives it; None without virtual stages."""
        return self.counts[0][0] if self.vp > 1 else None

    def layers(self, pp_rank: int, vp_rank: int = 0) -> range:
        """Global numbers of the layers of one chunk."""
        flat = [count for row in self.counts for count in row]
        position = vp_rank * self.pp + pp_rank
        first = sum(flat[:position])
        return range(first, first + flat[position])

    def is_first(self, pp_rank: int, vp_rank: int = 0) -> bool:
        """Whether this chunk holds the embedding."""
        return pp_rank == 0 and vp_rank == 0

    def is_last(self, pp_rank: int, vp_rank: int = 0) -> bool:
        """Whether this chunk holds the final norm and the output layer."""
        return pp_rank == self.pp - 1 and vp_rank == self.vp - 1

    def model_keys(self) -> list[str]:
        """Keys of a rank file's chunks, by virtual stage."""
        return ["model"] if self.vp == 1 else [f"model{rank}" for rank in range(self.vp)]

    def ranks(self) -> Iterator[tuple[int, int]]:
        """Every (tp rank, pp rank), one per file."""
        return ((tp_rank, pp_rank) for pp_rank in range(self.pp) for tp_rank in range(self.tp))

    def rank_folder(self, tp_rank: int, pp_rank: int) -> str:
        """`mp_rank_TT`, with `_PPP` when there are several pipeline stages."""
        return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if self.pp > 1 else "")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        """The layout written by `to_dict`."""
        return cls(values["tp"], values["pp"], tuple(tuple(row) for row in values["counts"]))

    def __str__(self) -> str:
        """For people: "TP2 PP2 VPP2"."""
        return f"TP{self.tp} PP{self.pp}" + (f" VPP{self.vp}" if self.vp > 1 else "")
