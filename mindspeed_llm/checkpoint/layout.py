"""Which rank holds which layer and which expert, and what its folder is called.

A *stage* is one pipeline rank; with virtual stages each holds several *chunks* of layers. Layers are handed out chunk
by chunk, the outer loop over virtual stages and the inner one over pipeline ranks; under the V-shaped schedule the
second chunks come back from the last rank to the first. A chunk is a list of *slots*: a layer's global number, or None
for a no-op layer, which holds no tensors but counts in the numbering inside the file.

Experts are spread over ranks of their own: `ep` groups of consecutive experts, each expert cut over `etp` ranks. The
ranks of a stage are numbered so that both tensor-parallel ranks run fastest, and a rank's file is named by its
(tensor, pipeline, expert) numbers, so not every (tensor, expert) pair need exist.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mindspeed_llm.errors import UsageError

RANK_FOLDER = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
CHECKPOINT_FILE = "model_optim_rng.pt"

Slots = tuple[int | None, ...]


class Rank(NamedTuple):
    """The numbers that name a rank's file."""

    tp: int
    pp: int
    ep: int = 0


class ExpertShare(NamedTuple):
    """The experts a rank holds: `count` from `first`, and which of the `parts` (ETP) cuts of each."""

    first: int
    count: int
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, and the layers of each chunk.

    Attributes:
        tp: tensor parallel size.
        pp: pipeline parallel size.
        chunks: `chunks[vp][pp]` slots of each chunk.
        ep: expert parallel size.
        etp: ranks an expert is cut over.
        tp_extends_ep: experts are spread whole over all tp x ep ranks (`--moe-tp-extend-ep`).
        v_shaped: the second chunks run backwards over the stages (`--schedules-method dualpipev`).
    """

    tp: int
    pp: int
    chunks: tuple[tuple[Slots, ...], ...]
    ep: int = 1
    etp: int = 1
    tp_extends_ep: bool = False
    v_shaped: bool = False

    @classmethod
    def even(cls, num_layers: int, tp: int = 1, pp: int = 1, layers_per_virtual_stage: int | None = None) -> "Layout":
        """Equal chunks of a model without experts; see `create`."""
        return cls.create(num_layers, tp, pp, layers_per_virtual_stage)

    @classmethod
    def create(
        cls,
        num_layers: int,
        tp: int = 1,
        pp: int = 1,
        layers_per_virtual_stage: int | None = None,
        *,
        stage_layers: Sequence[int] | None = None,
        noop_layers: Sequence[int] = (),
        ep: int = 1,
        etp: int | None = None,
        tp_extends_ep: bool = False,
        v_shaped: bool = False,
    ) -> "Layout":
        """The layout that these sizes describe.

        Args:
            num_layers: layers that hold tensors.
            stage_layers: layers of each stage (`--num-layer-list`); left out, equal ones.
            noop_layers: places of no-op layers, in the numbering that counts them.
            etp: left out, `tp`; 1 with `tp_extends_ep`.

        Raises:
            UsageError: a size is not positive, layers do not divide, or two options exclude each other.
        """
        sizes = {"tensor": tp, "pipeline": pp, "expert": ep, "expert tensor": tp if etp is None else etp}
        for what, value in sizes.items():
            if value < 1:
                raise UsageError(f"{what} parallel size {value} is not positive")
        if tp % (etp or tp):
            raise UsageError(f"expert tensor parallel size {etp} does not divide tensor parallel size {tp}")
        if tp_extends_ep and etp not in (None, 1):
            raise UsageError(f"--moe-tp-extend-ep does not cut experts; leave --expert-tensor-parallel-size {etp} out")
        if layers_per_virtual_stage is not None and layers_per_virtual_stage < 1:
            raise UsageError(f"--num-layers-per-virtual-pipeline-stage {layers_per_virtual_stage} is not positive")
        if v_shaped and layers_per_virtual_stage:
            raise UsageError(
                "the V-shaped schedule has two chunks per stage; leave --num-layers-per-virtual-pipeline-stage out"
            )
        slots = with_noops(num_layers, noop_layers)
        if stage_layers is not None:
            if layers_per_virtual_stage or noop_layers or v_shaped:
                raise UsageError("--num-layer-list excludes virtual stages, no-op layers and the V-shaped schedule")
            if len(stage_layers) != pp or sum(stage_layers) != num_layers or min(stage_layers) < 1:
                raise UsageError(
                    f"--num-layer-list {','.join(map(str, stage_layers))}: needs {pp} positive numbers (pipeline"
                    f" parallel size) that sum up to {num_layers} layers"
                )
            counts = [list(stage_layers)]
        else:
            counts = even_counts(len(slots), pp, 2 if v_shaped else None, layers_per_virtual_stage)
        chunks = deal(slots, counts, v_shaped)
        return cls(tp, pp, chunks, ep, 1 if tp_extends_ep else etp or tp, tp_extends_ep, v_shaped)

    @property
    def vp(self) -> int:
        """Chunks per pipeline rank."""
        return len(self.chunks)

    @property
    def num_layers(self) -> int:
        """Layers that hold tensors."""
        return sum(slot is not None for row in self.chunks for slots in row for slot in slots)

    @property
    def layers_per_virtual_stage(self) -> int | None:
        """As `--num-layers-per-virtual-pipeline-stage` gives it; None without virtual stages."""
        return len(self.chunks[0][0]) if self.vp > 1 else None

    @property
    def stage_layers(self) -> list[int]:
        """Slots of each stage, over its chunks."""
        return [sum(len(row[pp_rank]) for row in self.chunks) for pp_rank in range(self.pp)]

    @property
    def uniform(self) -> bool:
        """Whether all stages hold as many slots."""
        return len(set(self.stage_layers)) == 1

    @property
    def noop_layers(self) -> list[int]:
        """Places of the no-op layers, in the numbering that counts them."""
        slots = [slot for vp_rank, pp_rank in self.order() for slot in self.chunks[vp_rank][pp_rank]]
        return [place for place, slot in enumerate(slots) if slot is None]

    def order(self) -> list[tuple[int, int]]:
        """Every (virtual rank, pipeline rank), in the order of the network."""
        places = [(vp_rank, pp_rank) for vp_rank in range(self.vp) for pp_rank in range(self.pp)]
        return sorted(places, key=lambda place: self.position(*place))

    def position(self, vp_rank: int, pp_rank: int) -> int:
        """Place of a chunk in the order of the network."""
        return chunk_position(vp_rank, pp_rank, self.pp, self.v_shaped)

    def slots(self, pp_rank: int, vp_rank: int = 0) -> Slots:
        """The layers of one chunk, in the order of their numbers in the file."""
        return self.chunks[vp_rank][pp_rank]

    def is_first(self, pp_rank: int, vp_rank: int = 0) -> bool:
        """Whether this chunk holds the embedding."""
        return self.position(vp_rank, pp_rank) == 0

    def is_last(self, pp_rank: int, vp_rank: int = 0) -> bool:
        """Whether this chunk holds the final norm and the output layer."""
        return self.position(vp_rank, pp_rank) == self.pp * self.vp - 1

    def model_keys(self) -> list[str]:
        """Keys of a rank file's chunks, by virtual stage."""
        return ["model"] if self.vp == 1 else [f"model{rank}" for rank in range(self.vp)]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Every (tensor rank, expert rank) that exists."""
        if self.tp_extends_ep or self.etp == self.tp:
            return [(tp, ep) for ep in range(self.ep) for tp in range(self.tp)]
        ranks = range(math.lcm(self.tp, self.etp * self.ep))
        return list(dict.fromkeys((rank % self.tp, rank // self.etp % self.ep) for rank in ranks))

    def ranks(self) -> Iterator[Rank]:
        """Every rank that has a file."""
        return (Rank(tp, pp, ep) for pp in range(self.pp) for tp, ep in self.pairs)

    def rank_folder(self, tp_rank: int, pp_rank: int, ep_rank: int = 0) -> str:
        """`mp_rank_TT`, with `_PPP` when there are several stages and `_EEE` when there are several expert ranks."""
        stage = f"_{pp_rank:03d}" if self.pp > 1 else ""
        return f"mp_rank_{tp_rank:02d}{stage}" + (f"_{ep_rank:03d}" if self.ep > 1 else "")

    def check_experts(self, num_experts: int) -> None:
        """`UsageError` when the experts do not divide over the ranks."""
        over = self.ep * self.tp if self.tp_extends_ep else self.ep
        if num_experts % over:
            raise UsageError(
                f"{num_experts} experts are not divisible by {over} expert-parallel ranks; choose a divisor"
            )
        if not num_experts and self.ep > 1:
            raise UsageError(f"expert parallel size {self.ep}: the model has no experts; leave it at 1")

    def expert_share(self, tp_rank: int, ep_rank: int, num_experts: int) -> ExpertShare:
        """The experts of a rank."""
        if self.tp_extends_ep:
            count = num_experts // (self.ep * self.tp)
            return ExpertShare((ep_rank * self.tp + tp_rank) * count, count)
        count = num_experts // self.ep
        return ExpertShare(ep_rank * count, count, tp_rank % self.etp, self.etp)

    @property
    def world_size(self) -> int:
        """Processes that hold the model once: several of them share a file where experts are cut less than the rest."""
        experts = self.tp * self.ep if self.tp_extends_ep else self.etp * self.ep
        return self.pp * math.lcm(self.tp, experts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        """The layout written by `to_dict`; `ValueError` when it describes none."""
        chunks = tuple(tuple(tuple(slots) for slots in row) for row in values["chunks"])
        layout = cls(**{**values, "chunks": chunks})
        if any(type(size) is not int or size < 1 for size in (layout.tp, layout.pp, layout.ep, layout.etp)):
            raise ValueError("a parallel size of its layout is no positive integer")
        if not chunks or any(len(row) != layout.pp for row in chunks) or layout.tp % layout.etp:
            raise ValueError("its layout's parallel sizes do not fit together")
        held = [slot for place in layout.order() for slot in layout.slots(place[1], place[0]) if slot is not None]
        if held != list(range(len(held))):
            raise ValueError("its layout does not hold every layer once, in order")
        return layout

    def __str__(self) -> str:
        """For people: "TP2 PP2 VPP2 EP4 ETP1"."""
        text = f"TP{self.tp} PP{self.pp}" + (f" VPP{self.vp}" if self.vp > 1 else "")
        if self.ep > 1:
            text += f" EP{self.ep} ETP{self.etp}"
        return text + (f" with {len(self.noop_layers)} no-op layers" if self.noop_layers else "")


def with_noops(num_layers: int, noop_layers: Sequence[int]) -> list[int | None]:
    """Layer numbers with None at the places of no-op layers."""
    total = num_layers + len(noop_layers)
    wrong = [place for place in noop_layers if not 0 <= place < total]
    if wrong or len(set(noop_layers)) != len(noop_layers):
        raise UsageError(
            f"--noop-layers {','.join(map(str, noop_layers))}: needs different places below {total}"
            f" ({num_layers} layers and {len(noop_layers)} no-op layers)"
        )
    layers = iter(range(num_layers))
    return [None if place in noop_layers else next(layers) for place in range(total)]


def even_counts(slots: int, pp: int, virtual: int | None, per_chunk: int | None) -> list[list[int]]:
    """Equal chunks: `counts[vp][pp]`; `UsageError` when the layers do not divide."""
    if slots % pp:
        raise UsageError(
            f"{slots} layers are not divisible by pipeline parallel size {pp}; add --noop-layers, or give"
            " --num-layer-list"
        )
    stage = slots // pp
    chunk = stage // virtual if virtual else per_chunk or stage
    if chunk < 1 or stage % chunk or (virtual and chunk * virtual != stage):
        raise UsageError(f"{stage} layers per pipeline stage are not divisible by {chunk} layers per virtual stage")
    if stage // chunk > 1 and pp == 1:
        raise UsageError("virtual pipeline stages need a pipeline parallel size above 1, which is 1")
    return [[chunk] * pp for _ in range(stage // chunk)]


def chunk_position(vp_rank: int, pp_rank: int, pp: int, v_shaped: bool) -> int:
    """Place of a chunk in the order of the network."""
    return vp_rank * pp + (pp - 1 - pp_rank if v_shaped and vp_rank % 2 else pp_rank)


def deal(slots: Sequence[int | None], counts: list[list[int]], v_shaped: bool) -> tuple[tuple[Slots, ...], ...]:
    """Hand out the slots in the order of the network; -> `chunks[vp][pp]`."""
    pp = len(counts[0])
    places = [(vp_rank, pp_rank) for vp_rank in range(len(counts)) for pp_rank in range(pp)]
    found: dict[tuple[int, int], Slots] = {}
    start = 0
    for vp_rank, pp_rank in sorted(places, key=lambda place: chunk_position(*place, pp, v_shaped)):
        count = counts[vp_rank][pp_rank]
        found[vp_rank, pp_rank] = tuple(slots[start : start + count])
        start += count
    return tuple(tuple(found[vp_rank, pp_rank] for pp_rank in range(pp)) for vp_rank in range(len(counts)))
