"""Bytes a rank sends in a step, by the dimension of parallelism, and the products it computes.

A collective of S bytes (undivided) over g ranks sends (g - 1) / g x S per rank as an all-gather, reduce-scatter or
all-to-all, and twice that as an all-reduce, which is one after the other (ring).
"""

from collections import Counter
from dataclasses import dataclass, fields

from mindspeed_llm.checkpoint.tables import EMBEDDING
from mindspeed_llm.planning.activations import expert_pairs, tokens_between
from mindspeed_llm.planning.job import FULL_PRECISION, Job
from mindspeed_llm.planning.weights import ModelWeights, Pieces, held


@dataclass(frozen=True)
class Work:
    """What one micro-batch asks of a rank of a stage.

    Attributes:
        flops: of all its layers and the head, forward and backward.
        tensor, context, expert: bytes sent over TP (and ETP), CP, EP.
        pipeline: bytes sent to the neighbouring stages.
    """

    flops: float
    tensor: float
    context: float
    expert: float
    pipeline: float

    def with_(self, other: "Work") -> "Work":
        """Both together."""
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def sent(self) -> float:
        """All bytes."""
        return self.tensor + self.context + self.expert + self.pipeline


def share(parts: int) -> float:
    """(g - 1) / g."""
    return (parts - 1) / parts


def micro_batch_work(job: Job, sums: ModelWeights, pp_rank: int) -> Work:
    """Products and messages of one micro-batch on a rank of a stage, all its chunks together."""
    own = training_work(job, sums, pp_rank)
    return own.with_(reference_work(job, sums, pp_rank)) if job.pairs else own


def training_work(job: Job, sums: ModelWeights, pp_rank: int) -> Work:
    """Forward and backward."""
    layout = job.layout
    layers = [n for chunk in range(layout.vp) for n in layout.slots(pp_rank, chunk) if n is not None]
    again = recomputed_layers(job, pp_rank)
    flops = sum(layer_flops(job, sums, n, 1.0 + (n in again)) for n in layers)
    tensor = sum(layer_tensor_traffic(job, n, 1 + (n in again)) for n in layers)
    hidden = tokens_between(job) * job.model.hidden_size * job.element
    tables = job.tokens * job.model.hidden_size * job.element * share(layout.tp)
    boundaries = 0
    for chunk in range(layout.vp):
        if layout.is_first(pp_rank, chunk):
            tensor += (2 if job.sp == 1 else 1 + (job.lora is None)) * tables
        else:
            boundaries += 1
        if layout.is_last(pp_rank, chunk):
            flops += head_flops(job)
            tensor += (2 if job.sp > 1 else 2 * job.trained) * tables
        else:
            boundaries += 1
    keys = job.tokens * job.context * 2 * job.model.num_query_groups * job.model.kv_channels / layout.tp * job.element
    context = sum(2 + (n in again) for n in layers) * keys * share(job.context)
    expert = sum((4 + 2 * (n in again)) * expert_message(job) for n in layers if job.model.has("moe", n))
    return Work(flops, tensor, context, expert, boundaries * hidden if layout.pp > 1 else 0.0)


def reference_work(job: Job, sums: ModelWeights, pp_rank: int) -> Work:
    """The pass for the base's log-probabilities of the answers: forward, without adapters and without gradients."""
    layout, model = job.layout, job.model
    layers = [n for chunk in range(layout.vp) for n in layout.slots(pp_rank, chunk) if n is not None]
    experts = [n for n in layers if model.has("moe", n)]
    hidden = tokens_between(job) * model.hidden_size * job.element
    tables = job.tokens * model.hidden_size * job.element * share(layout.tp)
    keys = job.tokens * job.context * 2 * model.num_query_groups * model.kv_channels / layout.tp * job.element
    flops = tensor = 0.0
    for layer in layers:
        pairs = expert_pairs(job) if layer in experts else 0.0
        base = Counter({one: count for one, count in sums.layers[layer].items() if not one.adapter})
        flops += sum(products(base, job, job.tokens, pairs)) + attention_flops(job, layer)
        tensor += 2 * regions_of(job, layer) * tables
        if layer in experts and layout.etp > 1:
            tensor += 2 * pairs * model.hidden_size * job.element * share(layout.etp)
    boundaries = 0
    for chunk in range(layout.vp):
        if layout.is_first(pp_rank, chunk):
            tensor += (2 if job.sp == 1 else 1) * tables
        if layout.is_last(pp_rank, chunk):
            flops += head_flops(job) / (3 if job.trains_head else 2)
            tensor += (job.sp > 1) * tables
        else:
            boundaries += 1
    return Work(
        flops,
        tensor,
        len(layers) * keys * share(job.context),
        2 * len(experts) * expert_message(job),
        boundaries * hidden if layout.pp > 1 else 0.0,
    )


def recomputed_layers(job: Job, pp_rank: int) -> set[int]:
    """Layers of a stage whose forward pass runs twice."""
    if job.recompute != "full":
        return set()
    found: set[int] = set()
    for chunk in range(job.layout.vp):
        numbers = [n for n in job.layout.slots(pp_rank, chunk) if n is not None]
        found |= set(numbers if job.recompute_method == "uniform" else numbers[: job.recompute_layers])
    return found


def expert_message(job: Job) -> float:
    """Bytes of one all-to-all of a layer with experts: its own tokens' pairs that go to other ranks."""
    pairs = expert_pairs(job) / job.layout.etp
    return pairs * job.model.hidden_size * job.element * share(job.layout.ep)


def layer_tensor_traffic(job: Job, layer: int, forwards: int) -> float:
    """Bytes sent over TP by a layer: `forwards` forward passes and one backward pass.

    Attention and a dense MLP each sum [n h] over ranks once per pass: an all-reduce, or a gather and a reduce-scatter.
    The adapter's narrow tensor [n r] is summed beside each. Full tuning under sequence parallelism gathers the inputs
    of both once more. Experts cut over ETP gather and scatter the tokens of its ranks.
    """
    model, t, regions = job.model, job.layout.tp, regions_of(job, layer)
    passes = 2 * (forwards + 1) * regions
    volume = job.tokens * model.hidden_size * job.element * share(t)
    total = passes * volume
    if job.lora is not None:
        total += (forwards + 1) * regions * 2 * job.tokens * job.lora.r * job.element * share(t)
    elif job.sp > 1:
        total += regions * volume
    if needs_no_input_gradient(job, layer):
        total -= volume * (1 if job.sp > 1 else 2)
    if model.has("moe", layer) and job.layout.etp > 1:
        gathered = expert_pairs(job) * model.hidden_size * job.element
        total += 2 * (forwards + 1) * gathered * share(job.layout.etp)
    return total


def regions_of(job: Job, layer: int) -> int:
    """Parts of a layer that sum over TP: attention, and a dense MLP or shared expert."""
    model = job.model
    return 1 if model.has("moe", layer) and not model.moe_shared_ffn_hidden_size else 2


def layer_flops(job: Job, sums: ModelWeights, layer: int, forwards: float) -> float:
    """Operations of a layer's products on a rank and of its attention, `forwards` forward passes and one backward.

    A frozen weight costs as much backward as forward, a trained one twice that; attention (causal) twice.
    """
    pairs = expert_pairs(job) if job.model.has("moe", layer) else 0.0
    frozen, trained = products(sums.layers[layer], job, job.tokens, pairs)
    total = frozen * (forwards + 1) + trained * (forwards + 2) + attention_flops(job, layer) * (forwards + 2)
    if needs_no_input_gradient(job, layer):
        width = (job.model.num_attention_heads + 2 * job.model.num_query_groups) * job.model.kv_channels
        total -= 2.0 * job.tokens * width * job.model.hidden_size / job.layout.tp
    return total


def attention_flops(job: Job, layer: int) -> float:
    """Operations of scores and values of one forward pass on a rank."""
    model = job.model
    width = model.num_attention_heads * (model.v_head_dim if model.multi_latent_attention else model.kv_channels)
    row = job.length if job.rows is None else job.rows
    seen = min(row / 2, model.window(layer) or row)
    return 4 * job.tokens * seen * width / job.layout.tp


def needs_no_input_gradient(job: Job, layer: int) -> bool:
    """Whether nothing is trained before a layer's first projection; full recomputation asks for a gradient there."""
    if layer or job.lora is None or job.recompute == "full" or job.model.multi_latent_attention:
        return False
    embedding = EMBEDDING.removesuffix(".weight")
    return not (job.lora.adapts(embedding) or job.lora.saves(embedding))


def products(pieces: Pieces, job: Job, tokens: float, pairs: float) -> tuple[float, float]:
    """(frozen, trained) operations of one forward pass through matrices: 2 per element and row."""
    frozen = trained = 0.0
    for one, count in pieces.items():
        if one.columns == 1:
            continue
        rows = pairs / job.model.num_experts if one.of_expert else tokens
        work = 2.0 * rows * one.elements(job.layout) * count
        if one.trained:
            trained += work
        else:
            frozen += work
    return frozen, trained


def head_flops(job: Job) -> float:
    """Operations of the output layer on the labelled tokens."""
    work = 2.0 * job.tokens * job.trained * job.model.vocab_size * job.model.hidden_size / job.layout.tp
    return work * (3 if job.trains_head else 2)


def gradient_traffic(job: Job, sums: ModelWeights, pp_rank: int) -> float:
    """Bytes sent over data parallelism in a step: gradients in float32 summed, and parameters gathered."""
    pieces = sums.stage(job.layout, pp_rank)
    parts = [held(pieces, job.layout, adapter, True) for adapter in (False, True)]
    per_element = FULL_PRECISION + job.element if job.distributed_optimizer else 2 * FULL_PRECISION
    dense = sum(one.dense for one in parts) * share(job.replicas * job.context)
    return per_element * (dense + sum(one.expert for one in parts) * share(max(job.expert_replicas, 1)))
