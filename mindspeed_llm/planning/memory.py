"""Memory of a training step on each rank, by class: live tensor bytes at their peak.

The classes are those `planning.tracker` measures. `docs/plan.md` has the formulas and how far they were checked.
"""

from dataclasses import asdict, dataclass

from mindspeed_llm.planning import activations
from mindspeed_llm.planning.job import FULL_PRECISION, Job
from mindspeed_llm.planning.schedule import chunk_passes, received
from mindspeed_llm.planning.weights import Held, ModelWeights, held

MOMENTS = 2  # of Adam


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights, adapters, gradients: held all the time.
        optimizer: master copies, moments, and what an update makes for a moment.
        activations: kept and working, at most. communication: buffers that gathers and receives write into, at most.
        total: at most at any one moment: in the passes, or in the update.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    total: int

    def by_class(self) -> dict[str, int]:
        """Without the total."""
        return {name: value for name, value in asdict(self).items() if name != "total"}


def memory(job: Job, sums: ModelWeights, pp_rank: int) -> Memory:
    """Peak bytes of a rank of a pipeline stage."""
    pieces = sums.stage(job.layout, pp_rank)
    base, adapter = held(pieces, job.layout, False), held(pieces, job.layout, True)
    whole, factors = held(pieces, job.layout, False, True), held(pieces, job.layout, True, True)
    state, update = optimizer(job, whole, factors)
    weights, adapters = base.total * job.element, adapter.total * job.adapter_element
    gradients = (whole.total + factors.total) * FULL_PRECISION
    scratch = gradients + round(activations.rotary(job)) if copies_gradients(job) else 0
    acts, buffers = round(step_activations(job, pp_rank)), communication(job, pp_rank)
    return Memory(
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=state + update,
        activations=max(acts, scratch),
        communication=buffers,
        total=weights + adapters + gradients + state + max(acts + buffers, scratch, update),
    )


def every_stage(job: Job, sums: ModelWeights) -> list[Memory]:
    """By pipeline rank."""
    return [memory(job, sums, rank) for rank in range(job.layout.pp)]


def optimizer(job: Job, whole: Held, factors: Held) -> tuple[int, int]:
    """(held, made for a moment by an update) bytes of Adam.

    Held: two moments and, of what is trained in 16 bits, a master copy, float32; cut over replicas by the distributed
    optimizer. An update makes the root of the second moment, of all parameters at once on accelerators; on a CPU, of
    one after the other, twice.

    Args:
        whole: weights that are trained. factors: of the adapter.
    """
    state = elements = largest = 0
    for trained, bytes_each in ((whole, job.element), (factors, job.adapter_element)):
        own = trained.total
        if job.distributed_optimizer:
            own = trained.dense // (job.replicas * job.context) + trained.expert // max(job.expert_replicas, 1)
        state += own * (MOMENTS + (bytes_each < FULL_PRECISION)) * FULL_PRECISION
        elements += own
        largest = max(largest, min(trained.largest, own))
    return state, (elements if job.accelerator else 2 * largest) * FULL_PRECISION


def copies_gradients(job: Job) -> bool:
    """Whether gradients are copied while they are summed over replicas: gloo's reduce-scatter does, on CPUs."""
    return job.distributed_optimizer and job.replicas * job.context > 1 and not job.accelerator


def step_activations(job: Job, pp_rank: int) -> float:
    """Peak activations of a stage: in the head's forward pass, in a layer's backward pass, or for the embedding."""
    layers, layout = activations.Layers(job), job.layout
    passes = chunk_passes(job, pp_rank)
    kept = working = 0.0
    for chunk in passes:
        numbers = [number for number in layout.slots(pp_rank, chunk) if number is not None]
        kept += sum(kept_in_pass(job, layers, numbers)) + (layers.layer(numbers[0]).boundary if numbers else 0)
        for number in numbers:
            working = max(working, recomputed(job, layers, numbers) + layers.layer(number).working)
    peak = kept + working
    first = any(layout.is_first(pp_rank, chunk) for chunk in range(layout.vp))
    last = any(layout.is_last(pp_rank, chunk) for chunk in range(layout.vp))
    if last:
        peak = max(peak, kept + activations.head(job))
    if job.lora is None:
        peak = max(peak, kept, *weight_gradients(job, kept, working, first, last))
    return peak + activations.rotary(job)


def kept_in_pass(job: Job, layers: activations.Layers, numbers: list[int]) -> list[float]:
    """Bytes that each layer of a chunk keeps for a micro-batch."""
    found: list[float] = [layers.layer(number).kept for number in numbers]
    if job.recompute != "full":
        return found
    group = job.recompute_layers or 1
    if job.recompute_method == "block":
        return [layers.layer(n).boundary if place < group else found[place] for place, n in enumerate(numbers)]
    return [layers.layer(n).boundary if place % group == 0 else 0 for place, n in enumerate(numbers)]


def recomputed(job: Job, layers: activations.Layers, numbers: list[int]) -> float:
    """Bytes that come back while recomputed layers run backward, less what has gone by then.

    Uniform: those of a group of layers. Block: those of one layer, when the layers behind it have given theirs back.
    """
    if job.recompute != "full":
        return 0.0
    group = job.recompute_layers or 1
    kept = [layers.layer(number).kept for number in numbers]
    if job.recompute_method == "block":
        return max(0.0, max(kept[:group]) - sum(kept[group:]))
    return max(sum(kept[start : start + group]) for start in range(0, len(kept), group))


def weight_gradients(job: Job, kept: float, working: float, first: bool, last: bool) -> list[float]:
    """Moments of full tuning at which a weight's gradient stands beside its place in the buffer.

    The largest layer's beside the activations, less what the MLP has given back by then (gate, up and what was made of
    them, but for their gradient); the embedding's at the end, where nothing else is left: twice (looked up, and added),
    and three times where the output layer is tied to it on the same stage, whose own gradient waits
    during the whole backward pass.
    """
    model, layout, e = job.model, job.layout, job.element
    table = -(-model.vocab_size // layout.tp) * model.hidden_size * e
    tied = first and last and model.tie_word_embeddings
    waiting = table if tied else 0
    largest = largest_of_layers(job) * e
    given_back = 3 * job.tokens * model.ffn_hidden_size / layout.tp * e if not model.num_experts else 0
    moments = [kept + waiting + max(working, largest - given_back)]
    if first:
        moments.append((3 if tied else 2) * table)
    if last:
        labelled = job.tokens * job.trained
        moments.append(kept + table + labelled * (-(-model.vocab_size // layout.tp)) * (4 + e * (e < 4)))
    return moments


def largest_of_layers(job: Job) -> int:
    """Elements of the largest matrix of a layer on a rank."""
    model, layout = job.model, job.layout
    widths = [2 * model.ffn_hidden_size // layout.tp] if len(model.moe_layers) < model.num_layers else []
    if model.num_experts:
        widths.append(2 * model.moe_ffn_hidden_size // layout.etp)
    heads = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels // layout.tp
    return max(*widths, heads) * model.hidden_size


def communication(job: Job, pp_rank: int) -> int:
    """Bytes of buffers that others write into.

    Pipeline: hidden states received. Sequence parallelism: the whole sequence of hidden states, gathered for one layer
    or the head at a time (in full tuning megatron-core keeps the buffer of one and has that of another), and in the
    modular form the adapter's narrow tensor. CP: keys and values of all ranks.
    Experts: the pairs sent to this rank, and those that come back.
    """
    model, e = job.model, job.element
    hidden = activations.tokens_between(job) * model.hidden_size * e
    gathers = [0.0]
    if job.sp > 1:
        narrow = job.lora.r if job.lora is not None and not job.fused else 0
        whole = job.tokens * (model.hidden_size + narrow) * e
        gathers.append(2 * whole if job.lora is None else whole)
    if job.context > 1:
        gathers.append(job.tokens * job.context * 2 * model.num_query_groups * model.kv_channels / job.layout.tp * e)
    if job.layout.ep > 1:
        gathers.append(2 * activations.expert_pairs(job) * model.hidden_size * e)
    tensors = received(job, pp_rank)
    in_passes = tensors - (1 if pp_rank == 0 and job.layout.pp > 1 else 0)  # the next gradient comes between passes
    return round(max(tensors * hidden, in_passes * hidden + max(gathers)))
