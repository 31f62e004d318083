"""Activations of a layer and of the head, in bytes on one rank: what is kept for the backward pass, and what comes on
top of that while a layer's gradient is computed. `docs/plan.md` has the same formulas with their origin.

Symbols: n tokens of a micro-batch on a CP rank, m = n / t under sequence parallelism else n, h hidden, q and k widths
of queries and keys, f ffn, t TP, c CP, r LoRA rank, e bytes per element.
"""

from dataclasses import dataclass

from mindspeed_llm.device.rowwise import COLUMNS
from mindspeed_llm.models.context import ALONE
from mindspeed_llm.models.head import ROWS
from mindspeed_llm.planning.job import Job

FLOAT = 4


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer and micro-batch.

    Attributes:
        kept: between forward and backward pass.
        working: at most, beyond what is kept, while the layer's backward pass runs.
        boundary: its input or output.
    """

    kept: int
    working: int
    boundary: int


class Layers:
    """Activations of a job's layers; equal layers are computed once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.made: dict[tuple[bool, bool], LayerActivations] = {}

    def layer(self, number: int) -> LayerActivations:
        """Of a layer by its global number."""
        job = self.job
        local = job.model.window(number) is not None
        key = job.model.has("moe", number), local
        if key not in self.made:
            boundary = tokens_between(job) * job.model.hidden_size * job.element
            mlp = experts(job, number) if key[0] else dense_mlp(job, number)
            kept = residual(job) + attention(job, number) + mlp.kept
            again = whole_sequence(job) - mlp.kept if job.recompute == "selective" else 0  # the MLP's are gone by then
            self.made[key] = LayerActivations(round(kept), round(max(mlp.working, again) + boundary), boundary)
        return self.made[key]


@dataclass(frozen=True)
class Part:
    """Kept and working bytes of a part of a layer."""

    kept: float
    working: float


def tokens_between(job: Job) -> int:
    """m: tokens a rank holds between TP regions."""
    return -(-job.tokens // job.sp)


def keeps_input(job: Job, layer: int, module: str) -> bool:
    """Whether a linear layer keeps its input: for its own gradient, or its adapter's."""
    name = f"decoder.layers.{layer}.{module}"
    return job.lora is None or job.lora.adapts(name) or job.lora.saves(name)


def norm(job: Job, tokens: float, width: float) -> float:
    """A norm's own bytes beside its input: one number per token.

    A zero-centred one (Gemma) is computed on a float32 copy of its input, and on a CPU keeps, where its weight is
    trained, the normalised input too.
    """
    copies = 0
    if job.model.zero_centered_norm:
        copies = 1 + (job.lora is None and not job.accelerator)
    return tokens * FLOAT * (1 + copies * width)


def residual(job: Job) -> float:
    """Both norms of a layer: their inputs (the residual sums) and outputs.

    An output is kept as the input of adapted or trained layers. Post norms (Gemma, GLM-4) have inputs of their own.
    """
    model, tokens, e = job.model, tokens_between(job), job.element
    norms = 4 if model.post_norms else 2
    read = [keeps_input(job, 0, module) for module in ("self_attention.linear_qkv", "mlp.linear_fc1")]
    outputs = 2 if model.num_experts or model.multi_latent_attention else sum(read)
    return (norms + outputs) * tokens * model.hidden_size * e + norms * norm(job, tokens, model.hidden_size)


def attention(job: Job, layer: int) -> float:
    """Projections, normalised and turned q and k, and the output of attention with its log-sums.

    q, k, v [n (q + 2 k) / t] as projected; copies of q and k that their norms read; q and k turned; the output.
    Under CP keys and values are those of the whole sequence, which are copies: k and v as projected are not kept, nor
    therefore q, which they share memory with.
    """
    model, n, e, t = job.model, job.tokens, job.element, job.layout.tp
    if model.multi_latent_attention:
        return latent_attention(job, layer)
    q = model.num_attention_heads * model.kv_channels / t
    k = model.num_query_groups * model.kv_channels / t
    widths = q + 2 * k + q + k + q  # projected, turned q and k, output
    log_sums = 0 if job.recompute == "selective" else model.num_attention_heads / t * FLOAT
    kept = n * log_sums
    if model.qk_layernorm:
        widths += q + k
        kept += norm(job, n, q) + norm(job, n, k)
    if job.context > 1 and job.recompute != "selective":
        widths -= (q + 2 * k) + k
        kept += whole_sequence(job)
    if model.attention_softcap is not None or model.attention_sinks:
        widths += q + 2 * k if model.attention_sinks else q
    return kept + n * widths * e + low_rank(job, layer, ("self_attention.linear_qkv", "self_attention.linear_proj"))


def whole_sequence(job: Job) -> float:
    """What a layer's attention keeps under CP only.

    Keys and values of all ranks, the output of each piece apart, and the masks of pieces that begin within a row:
    piece number j of a row's 2 c sees j + 1 of them, and a rank has the numbers j and 2 c - 1 - j. A mask is for all
    rows of a batch; rows one behind the other have each their own. Short ones are cut all together: a rank's two pieces
    begin within a row each, half of it on the average.
    """
    if job.context == 1:
        return 0.0
    model, t, pieces = job.model, job.layout.tp, 2 * job.context
    q = model.num_attention_heads * model.kv_channels / t
    k = model.num_query_groups * model.kv_channels / t
    row, number = job.length, 1
    if job.rows is not None:
        row, number = job.rows, max(1, job.micro_batch * job.length // job.rows)
    cut_alone = job.rows is None or row > min(ALONE, number * row // pieces)
    masks = number * (pieces + 1) * (row / pieces) ** 2 if cut_alone else row**2
    return (job.tokens * (2 * k * job.context + q) + masks) * job.element


def latent_attention(job: Job, layer: int) -> float:
    """Latent attention (DeepSeek): low-rank projections, queries and keys of all heads put together, and the output."""
    model, n, e, t = job.model, job.tokens, job.element, job.layout.tp
    heads, head = model.num_attention_heads / t, model.qk_head_dim + model.qk_pos_emb_head_dim
    narrow = model.q_lora_rank + 2 * model.kv_lora_rank + model.qk_pos_emb_head_dim
    wide = heads * (3 * head + head + model.qk_head_dim + 2 * model.v_head_dim)
    names = ("q_proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")
    modules = tuple(f"self_attention.linear_{name}" for name in names)
    return n * (2 * narrow + wide) * e + n * heads * FLOAT + low_rank(job, layer, modules)


def low_rank(job: Job, layer: int, modules: tuple[str, ...]) -> float:
    """X A^T of the adapted layers among `modules` (n r each)."""
    if job.lora is None:
        return 0
    names = (f"decoder.layers.{layer}.{module}" for module in modules)
    return sum(job.tokens * job.lora.rank(name) * job.element for name in names if job.lora.adapts(name))


def dense_mlp(job: Job, layer: int) -> Part:
    """Gate and up [n 2 f / t], and step by step the activation, the other factor and their product [n f / t] each.

    A whole fused MLP keeps gate and up only. Working: gradients of the product and its factors, of which the first
    takes the product's place; a whole fused MLP: that of the product, of gate and up, and the product made again.
    """
    n, e = job.tokens, job.element
    unit = n * job.model.ffn_hidden_size / job.layout.tp * e
    low = low_rank(job, layer, ("mlp.linear_fc1", "mlp.linear_fc2"))
    if job.fused_mlp and job.lora is not None:
        return Part(2 * unit + low, 4 * unit)
    product = unit if keeps_input(job, layer, "mlp.linear_fc2") else 0
    return Part(4 * unit + product + low, 2 * unit)


def expert_pairs(job: Job) -> float:
    """Token-expert pairs that reach a rank's experts, when they are chosen evenly: n / sp x top-k x ETP."""
    return tokens_between(job) * job.model.moe_router_topk * job.layout.etp


def experts(job: Job, layer: int) -> Part:
    """Router (float32 scores), pairs [P h] as experts get them, gate and up, activation, product, weighted.

    Apart, megatron-core's activation also keeps a copy of the other factor.
    """
    model, e = job.model, job.element
    pairs, width = expert_pairs(job), model.moe_ffn_hidden_size / job.layout.etp
    unit = pairs * width * e
    router = tokens_between(job) * model.num_experts * FLOAT * 3
    adapted = keeps_input(job, layer, "mlp.experts.local_experts.0.linear_fc1")
    low = 0.0
    if job.lora is not None:
        names = ("linear_fc1", "linear_fc2")
        modules = [f"decoder.layers.{layer}.mlp.experts.local_experts.0.{name}" for name in names]
        low = sum(pairs * job.lora.rank(name) * e for name in modules if job.lora.adapts(name))
    kept = router + (pairs * model.hidden_size * e if adapted else 0) + (6 if job.experts_apart else 5) * unit + low
    shared = job.tokens * model.moe_shared_ffn_hidden_size / job.layout.tp * e
    return Part(kept + 5 * shared, 2 * unit + 2 * pairs * model.hidden_size * e)


def head(job: Job) -> float:
    """Bytes of final norm, output layer and loss of a micro-batch, at most.

    Frozen: the final norm's output, the labelled rows l and their gradient; for up to 512 rows at a time logits
    [l' v / t] and the product's result, in 16-bit training float32 temporaries of a slice of the vocabulary. Trained:
    all logits in the model's type, and twice in float32.
    """
    model, e, t = job.model, job.element, job.layout.tp
    h, labelled = model.hidden_size, job.tokens * job.trained
    vocabulary = -(-model.vocab_size // t)
    before = tokens_between(job) * h * e + labelled * h * e + norm(job, tokens_between(job), h)
    if job.trains_head:
        return before + labelled * vocabulary * (2 * FLOAT + (e if e < FLOAT else 0))
    rows, part = min(labelled, ROWS), min(COLUMNS, vocabulary)
    width = h * e
    if e < FLOAT:
        width = max(2 * part * FLOAT, h * (FLOAT + 2 * e))
    if model.logit_softcap is not None:
        width = max(width, 4 * part * FLOAT)
    return before + labelled * h * e + rows * (vocabulary * e + width)


def rotary(job: Job) -> float:
    """The table of cosines and sines, float32, for half as many positions again."""
    model = job.model
    if model.multi_latent_attention:
        return 0
    kinds = 1 + (model.rotary_base_local is not None)
    return 1.5 * job.length * kinds * 2 * model.kv_channels * model.rotary_percent * FLOAT
