"""What a job costs on a card: memory of its fullest rank, bytes sent, seconds of a step."""

from dataclasses import dataclass

from mindspeed_llm.device.cards import Card
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.memory import Memory, memory
from mindspeed_llm.planning.schedule import bubble
from mindspeed_llm.planning.traffic import Work, gradient_traffic, micro_batch_work
from mindspeed_llm.planning.weights import ModelWeights

FULL_PRECISION_RATE = 1 / 8
"""Rate of float32 products relative to bfloat16 ones, assumed of accelerators."""


@dataclass(frozen=True)
class Estimate:
    """A job's cost.

    Attributes:
        job: what was estimated: for memory, its longest micro-batch.
        memory: of the rank that needs most.
        stage: its pipeline rank.
        seconds: of a step; compute, messages: their parts of it on the slowest stage, pipeline bubble included.
        sent: bytes that rank sends in a step.
        tokens: of a step, padding included.
    """

    job: Job
    memory: Memory
    stage: int
    seconds: float
    compute: float
    messages: float
    sent: float
    tokens: float

    @property
    def rate(self) -> float:
        """Tokens per second and card."""
        return self.tokens / self.seconds / self.job.cards


def fullest(job: Job, sums: ModelWeights) -> tuple[Memory, int]:
    """Memory of the stage that needs most: the first holds most micro-batches, the last the output layer."""
    stages = sorted({0, job.layout.pp - 1})
    needs = [memory(job, sums, rank) for rank in stages]
    worst = max(range(len(needs)), key=lambda place: needs[place].total)
    return needs[worst], stages[worst]


def rate_of(job: Job, card: Card) -> float:
    """Operations per second of the job's products."""
    return card.rate * (FULL_PRECISION_RATE if job.dtype == "float32" and card.name != "cpu" else 1.0)


def link(span: int, card: Card) -> float:
    """Bytes per second between ranks of which `span` consecutive ones hold a group; TP runs fastest, PP slowest."""
    return card.link if span <= card.node else card.network


def message_seconds(job: Job, work: Work, card: Card) -> float:
    """Seconds of a micro-batch's messages, none of them hidden."""
    tp, pp = job.layout.tp, job.layout.pp
    spans = (
        (work.tensor, tp),
        (work.context, tp * job.context),
        (work.expert, job.layout.etp * job.layout.ep),
        (work.pipeline, job.cards // pp * 2 if pp > 1 else 1),
    )
    return sum(sent / link(span, card) for sent, span in spans)


def estimate(job: Job, mean: Job, sums: ModelWeights, card: Card) -> Estimate:
    """Memory of `job` (the longest rows) and time of `mean` (the mean row) at the same layout."""
    need, stage = fullest(job, sums)
    works = [micro_batch_work(mean, sums, rank) for rank in sorted({0, job.layout.pp - 1})]
    seconds = [(work.flops / rate_of(job, card), message_seconds(mean, work, card)) for work in works]
    compute, messages = max(seconds, key=sum)
    passes = mean.micro_batches * (1 + bubble(mean))
    replicas = mean.replicas * mean.context
    gradients = gradient_traffic(mean, sums, stage)
    exchange = gradients / link(mean.layout.tp * replicas, card)
    sent = max(work.sent for work in works) * mean.micro_batches + gradients
    tokens = mean.micro_batch * mean.length * mean.micro_batches * mean.replicas
    total = (compute + messages) * passes + exchange
    return Estimate(job, need, stage, total, compute * passes, messages * passes + exchange, sent, tokens)
