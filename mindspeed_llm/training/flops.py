"""Floating-point operations that a training step executes, by closed form.

Per token, a product with a weight of n elements costs

    2n forward  +  2n for the gradient of its input  +  2n for its own gradient, which a frozen weight does not need

so LoRA costs 4N + 6 n_lora, 2n more for each module trained whole beside it, and full tuning 6N. Below the first
adapter nothing needs a gradient: the first layer's products that read the frozen embedding cost 2n only. The output
layer runs on trained tokens alone. Attention over k keys per query costs 2 k h (d_qk + d_v) forward and twice that
backward, h heads; causal attention over s tokens has k = (s + 1) / 2 on average. Full recomputation adds the layers'
forward operations once more, and the first layer's gradients with them; selective recomputation adds those of the
attention.

Not counted: element-wise work, what DoRA adds, the scores that flash attention computes again in its backward pass
(half its forward operations), and masked scores, which kernels that do not skip them compute too.
"""

from dataclasses import dataclass

from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.tables import EMBEDDING
from mindspeed_llm.models.config import ModelConfig

STREAM, UP, OUT, MLP_IN, MLP_OUT = range(5)
"""Stages of a layer in order of computation: what reads the layer's input, latent up projections, the attention's
output, the MLP's first product (and the router), its second."""


@dataclass(frozen=True)
class Product:
    """One kind of matrix product: `fan_in` -> `fan_out`, `times` a token; `name` is its module's within the layer."""

    name: str
    stage: int
    fan_in: int
    fan_out: int
    times: int = 1

    @property
    def elements(self) -> int:
        """Elements of the weights one token is multiplied with."""
        return self.fan_in * self.fan_out * self.times


def layer_products(model: ModelConfig, layer: int) -> list[Product]:
    """The products of one layer, of experts those that one token passes."""
    hidden = model.hidden_size
    if not model.has("moe", layer):
        wide, narrow = 2 * model.ffn_hidden_size, model.ffn_hidden_size
        mlp = [Product("mlp.linear_fc1", MLP_IN, hidden, wide), Product("mlp.linear_fc2", MLP_OUT, narrow, hidden)]
        return attention_products(model) + mlp
    mlp = [Product("mlp.router", MLP_IN, hidden, model.num_experts)]
    kinds = (
        ("mlp.experts.local_experts.0", model.moe_ffn_hidden_size, model.moe_router_topk),
        ("mlp.shared_experts", model.moe_shared_ffn_hidden_size, 1),
    )
    for name, width, times in kinds:
        if width:
            mlp.append(Product(f"{name}.linear_fc1", MLP_IN, hidden, 2 * width, times))
            mlp.append(Product(f"{name}.linear_fc2", MLP_OUT, width, hidden, times))
    return attention_products(model) + mlp


def attention_products(model: ModelConfig) -> list[Product]:
    """The products of one attention, latent (DeepSeek) or ordinary."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if not model.multi_latent_attention:
        width = model.kv_channels
        return [
            Product("self_attention.linear_qkv", STREAM, hidden, (heads + 2 * model.num_query_groups) * width),
            Product("self_attention.linear_proj", OUT, heads * width, hidden),
        ]
    head, value, rank = model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim, model.kv_lora_rank
    if model.q_lora_rank:
        query = [
            Product("self_attention.linear_q_down_proj", STREAM, hidden, model.q_lora_rank),
            Product("self_attention.linear_q_up_proj", UP, model.q_lora_rank, heads * head),
        ]
    else:
        query = [Product("self_attention.linear_q_proj", STREAM, hidden, heads * head)]
    return [
        *query,
        Product("self_attention.linear_kv_down_proj", STREAM, hidden, rank + model.qk_pos_emb_head_dim),
        Product("self_attention.linear_kv_up_proj", UP, rank, heads * (model.qk_head_dim + value)),
        Product("self_attention.linear_proj", OUT, heads * value, hidden),
    ]


@dataclass(frozen=True)
class Cost:
    """FLOPs of a step by kind, forward and backward together."""

    layers: float = 0.0
    adapters: float = 0.0
    head: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.adapters + self.head + self.attention


class StepFlops:
    """Counts the steps of one model, trained in one way.

    Args:
        settings: of the adapter; None in full tuning.
        recompute: "full", "selective" or None.
        reference: the base computes the same tokens once more, forward only, as preferences need.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: LoraSettings | None,
        recompute: str | None = None,
        reference: bool = False,
    ) -> None:
        self.reference = reference
        self.model, self.trains_head = model, settings is None or settings.saves("output_layer")
        self.layers = self.adapters = 0  # FLOPs per token
        # window (None: all keys) -> how often the forward operations of an attention with it are spent, over the layers
        self.core: dict[int | None, int] = {}
        # whether the input of what comes next needs a gradient; full recomputation gives the embedding's output one
        table = EMBEDDING.removesuffix(".weight")
        needed = settings is None or recompute == "full" or settings.saves(table) or settings.adapts(table)
        if settings is not None and settings.adapts(table):  # B's rows are looked up; A's product, and both gradients
            self.adapters += 6 * settings.rank(table) * model.hidden_size
        for layer in range(model.num_layers):
            needed = self._layer(layer, settings, recompute, needed)

    def _layer(self, layer: int, settings: LoraSettings | None, recompute: str | None, needed: bool) -> bool:
        """Add one layer; -> whether its output needs a gradient."""
        again = 2 if recompute == "full" else 0
        products = layer_products(self.model, layer)
        for stage in range(MLP_OUT + 1):
            adapted = False
            if stage == OUT:
                window, times = self._window(layer), 1 + 2 * needed + (recompute is not None) + self.reference
                self.core[window] = self.core.get(window, 0) + times
            for one in (p for p in products if p.stage == stage):
                module = f"decoder.layers.{layer}.{one.name}"
                whole = settings is None or settings.saves(module)
                adapted = adapted or whole
                self.layers += (2 + again + 2 * needed + 2 * whole + 2 * self.reference) * one.elements
                if settings is not None and settings.adapts(module):
                    adapted, rank = True, settings.rank(module)
                    narrow, wide = rank * one.fan_in * one.times, rank * one.fan_out * one.times
                    self.adapters += (4 + again + 2 * needed) * narrow + (6 + again) * wide
            needed = needed or adapted
        return needed

    def step(self, lengths: list[int], trained: float) -> Cost:
        """FLOPs of forward and backward over sequences of these lengths, padding included.

        Args:
            trained: tokens among them that have a label.
        """
        tokens = sum(lengths)
        times = 4 + 2 * self.trains_head + 2 * self.reference
        head = times * self.model.vocab_size * self.model.hidden_size * trained
        attention = sum(times * self._scores(window, lengths) for window, times in self.core.items())
        return Cost(self.layers * tokens, self.adapters * tokens, head, attention)

    def _window(self, layer: int) -> int | None:
        """Keys that a layer's attention sees at most; None for all."""
        types = self.model.layer_types
        return self.model.sliding_window if types and types[layer] == "sliding_attention" else None

    def _scores(self, window: int | None, lengths: list[int]) -> float:
        """FLOPs of one layer's attention forward: scores and values, of the keys that the mask admits."""
        model = self.model
        widths = 2 * model.kv_channels
        if model.multi_latent_attention:
            widths = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
        return 2.0 * model.num_attention_heads * widths * sum(visible(length, window) for length in lengths)


def visible(length: int, window: int | None) -> int:
    """Pairs of a query and a key it sees in a causal sequence: sum over i of min(i, window)."""
    edge = min(length, window or length)
    return edge * (edge + 1) // 2 + (length - edge) * edge
