"""Layouts for a number of cards: every one that the model and the batch allow, those that fit first, fastest first."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.device.cards import Card
from mindspeed_llm.errors import UsageError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.planning.estimate import Estimate, estimate
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.weights import ModelWeights

USABLE = 0.92
"""Share of a card's memory that live tensors may take: contexts, kernels' workspaces and fragments need the rest."""
LONG = 16384  # tokens from which context parallelism is tried
MOST_ROWS = 8  # of a micro-batch that is tried


@dataclass(frozen=True)
class Lengths:
    """Rows as they reach the model.

    Attributes:
        longest: tokens of the longest row, mean: of the mean one, padding included.
        trained: share of the mean row's tokens that have a label; the longest row is taken to have labels throughout.
        origin: where these come from, for people.
        rows: tokens of the longest and of the mean row where rows stand one behind the other, which may be several in
            one row of the data (`--neat-pack`); None where they do not.
    """

    longest: int
    mean: float
    trained: float = 1.0
    origin: str = ""
    rows: tuple[int, float] | None = None


@dataclass(frozen=True)
class Wish:
    """What is to be trained, on what.

    Attributes:
        settings: of the adapter; None in full tuning.
        pairs: rows are pairs of answers (DPO), of which a micro-batch holds both.
        global_batch: rows (or pairs) of a step; None for 4 on every card.
        fixed: sizes the user has decided: tp, pp, ep, etp, cp, micro_batch, layers_per_chunk, recompute.
    """

    model: ModelConfig
    settings: LoraSettings | None
    cards: int
    card: Card
    lengths: Lengths
    dtype: str
    fused: bool = False
    fused_mlp: bool = False
    pairs: bool = False
    experts_apart: bool = False
    global_batch: int | None = None
    fixed: dict[str, int | str | None] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.global_batch or 4 * self.cards

    def choices(self, name: str, all_of_them: list[int]) -> list[int]:
        """The sizes to try: the user's own where there is one."""
        given = self.fixed.get(name)
        return [int(given)] if given is not None else all_of_them

    @property
    def usable(self) -> int:
        """Bytes that live tensors may take."""
        return round(self.card.memory * USABLE)


def divisors(number: int, most: int | None = None) -> list[int]:
    """Of a number, up to `most`."""
    return [one for one in range(1, min(number, most or number) + 1) if number % one == 0]


def tensor_sizes(wish: Wish, sums: ModelWeights) -> list[int]:
    """TP sizes that cut every weight, within a node."""
    found = []
    for size in divisors(wish.cards, wish.card.node):
        layers = [0, wish.model.num_layers - 1]
        entries = [one for layer in layers for one in sums.table.of_layer[layer] if one.expert is None]
        try:
            for entry in entries:
                entry.shard_map(size, None)
        except UsageError:
            continue
        found.append(size)
    return wish.choices("tp", found)


def layouts(wish: Wish, sums: ModelWeights) -> Iterator[tuple[Layout, int]]:
    """(layout, CP) of every way to spread the model over the cards."""
    experts, number = wish.model.num_experts, wish.cards
    stages = [size for size in divisors(number) if wish.model.num_layers % size == 0]
    sizes = itertools.product(
        tensor_sizes(wish, sums),
        wish.choices("pp", stages),
        wish.choices("cp", divisors(number, 8) if wish.lengths.longest >= LONG else [1]),
        wish.choices("ep", divisors(experts) if experts else [1]),
    )
    for tp, pp, cp, ep in sizes:
        for etp in wish.choices("etp", sorted({1, tp})) if experts else [None]:
            if number % (tp * pp * cp) == 0 and number % (pp * ep * (etp or 1)) == 0:
                yield from cut(wish, tp, pp, ep, etp, cp)


def cut(wish: Wish, tp: int, pp: int, ep: int, etp: int | None, cp: int) -> Iterator[tuple[Layout, int]]:
    """One layout for each number of layers of a chunk: a whole stage, half of it, a single layer."""
    stage = wish.model.num_layers // pp
    given = wish.fixed.get("layers_per_chunk")
    chunks: list[int | None] = [None]
    if given is not None:
        chunks = [int(given)]
    elif pp > 1:
        chunks += [size for size in sorted({1, stage // 2}) if size and size < stage and stage % size == 0]
    for size in chunks:
        try:
            layout = Layout.create(wish.model.num_layers, tp, pp, size, ep=ep, etp=etp)
            layout.check_experts(wish.model.num_experts)
        except UsageError:
            continue
        yield layout, cp


def jobs(wish: Wish, sums: ModelWeights) -> Iterator[Job]:
    """Every job to estimate, with the longest rows."""
    recomputes = [wish.fixed["recompute"]] if wish.fixed.get("recompute") else [None, "full"]
    for layout, cp in layouts(wish, sums):
        replicas = wish.cards // (layout.tp * layout.pp * cp)
        for rows in wish.choices("micro_batch", [2**power for power in range(MOST_ROWS.bit_length())]):
            number, rest = divmod(wish.rows, rows * replicas)
            if rest or not number or (layout.vp > 1 and number % layout.pp):
                continue
            for recompute in recomputes:
                full = recompute == "full"
                yield Job(
                    model=wish.model,
                    layout=layout,
                    cards=wish.cards,
                    context=cp,
                    sequence_parallel=layout.tp > 1,
                    dtype=wish.dtype,
                    lora=wish.settings,
                    fused=wish.fused,
                    fused_mlp=wish.fused_mlp,
                    experts_apart=wish.experts_apart,
                    recompute=str(recompute) if recompute else None,
                    recompute_method="uniform" if full else None,
                    recompute_layers=1 if full else None,
                    distributed_optimizer=replicas * cp > 1,
                    pairs=wish.pairs,
                    micro_batch=rows * (2 if wish.pairs else 1),
                    micro_batches=number,
                    length=wish.lengths.longest,
                    rows=wish.lengths.rows and wish.lengths.rows[0],
                    accelerator=wish.card.name != "cpu",
                )


def propose(wish: Wish) -> list[Estimate]:
    """All estimates, best first: those that fit by speed, then the others by how little is missing.

    Raises:
        UsageError: no layout is possible at all.
    """
    sums = ModelWeights(wish.model, wish.settings)
    found = []
    for job in jobs(wish, sums):
        lengths = wish.lengths
        rows = lengths.rows and max(1, round(lengths.rows[1]))
        mean = replace(job, length=max(1, round(lengths.mean)), rows=rows, trained=lengths.trained)
        found.append(estimate(job, mean, sums, wish.card))
    if not found:
        raise UsageError(
            f"--plan: no layout of {wish.cards} cards divides {wish.model.num_layers} layers, "
            f"{wish.model.num_attention_heads} heads and {wish.rows} rows of a step"
            f"{' with the sizes given' if wish.fixed else ''}; change --cards, --global-batch-size or the sizes given"
        )

    def order(one: Estimate) -> tuple[bool, float]:
        misses = one.memory.total > wish.usable
        return misses, one.memory.total if misses else -one.rate

    return sorted(found, key=order)


def flags(job: Job) -> list[str]:
    """The options that make the job, to be pasted."""
    layout = job.layout
    words: list[str] = []

    def say(flag: str, value: int | str | None, usual: int | str | None = 1) -> None:
        if value != usual:
            words.extend([f"--{flag}", str(value)])

    say("tensor-model-parallel-size", layout.tp)
    say("pipeline-model-parallel-size", layout.pp)
    say("num-layers-per-virtual-pipeline-stage", layout.layers_per_virtual_stage, None)
    say("context-parallel-size", job.context)
    say("expert-model-parallel-size", layout.ep)
    if job.model.num_experts:
        say("expert-tensor-parallel-size", layout.etp, layout.tp)
    words += ["--sequence-parallel"] if job.sequence_parallel else []
    words += ["--use-distributed-optimizer"] if job.distributed_optimizer else []
    if job.recompute == "full":
        words += ["--recompute-granularity", "full", "--recompute-method", str(job.recompute_method)]
        words += ["--recompute-num-layers", str(job.recompute_layers)]
    elif job.recompute:
        words += ["--recompute-granularity", job.recompute]
    micro = job.micro_batch // 2 if job.pairs else job.micro_batch
    whole = micro * job.micro_batches * job.replicas
    return [*words, "--micro-batch-size", str(micro), "--global-batch-size", str(whole)]
