"""The dimensions of a model: read from HF's config.json or from a checkpoint, never typed into a recipe.

`ModelConfig` uses megatron-core's field names. `check_architecture_flags` holds upstream's architecture flags against
it: they are accepted where they agree and refused, with both values, where they contradict the model.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.families import family as family_named
from mindspeed_llm.models.families import family_of_architecture
from mindspeed_llm.models.hf_config import check_required, flatten_hf_config, hf_value, wrong_type

ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""The kinds of rope scaling `models.rope` computes, and the keys each needs."""
MOST = {"num_layers": 10_000, "num_experts": 10_000, "mtp_num_layers": 100}
"""Above these a count is damage: every layer and expert gets its rows in the weight table."""
LARGEST = 1 << 40
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModelConfig:
    """Everything a weight table and the live model need to know about one model.

    Field names are megatron-core's where it has the notion. The defaults are those of a plain Llama.

    Attributes:
        family: name of the family page (`mindspeed_llm.models.families`).
        num_query_groups: key/value heads.
        kv_channels: size of one attention head.
        vocab_size: rows of the embedding table in the HF model, before any padding for tensor parallelism.
        dtype: of the stored weights, as torch spells it ("bfloat16").
        rotary_base: rope theta; rotary_base_local: that of sliding-window layers, where it differs (Gemma 3).
        rotary_percent: the share of a head that is rotated.
        rotary_interleaved: pairs are neighbours (GLM-4), not halves.
        rope_scaling: HF's dictionary with its `rope_type` (llama3, yarn, longrope, linear ...); None without one.
        add_qkv_bias, add_proj_bias, add_mlp_bias: biases of q/k/v, of the attention's output, of the MLP (experts too).
        layer_types: "full_attention" or "sliding_attention" for each layer; empty when all are full.
        sliding_window: positions a sliding layer sees, its own included.
        attention_scale: factor of q k^T; None for 1 / sqrt(kv_channels).
        attention_softcap, logit_softcap: c in c * tanh(x / c), for attention scores and final logits (Gemma 2).
        attention_sinks: one learnt logit per head joins the softmax's denominator (gpt-oss).
        embedding_scale: factor of the embedding's output (Gemma).
        zero_centered_norm: norms multiply by 1 + weight (Gemma).
        post_norms: a norm follows the attention and the MLP before the residual sum (Gemma 2 and 3, GLM-4).
        activation: silu, gelu_tanh, or clamped_swiglu (gpt-oss).
        num_experts: 0 for a dense model.
        moe_layers: numbers of the layers that have experts.
        moe_ffn_hidden_size: of one expert; moe_shared_ffn_hidden_size: of all shared experts together, 0 without.
        moe_shared_expert_gate: the shared experts' output is multiplied by a learnt sigmoid gate (Qwen2-MoE).
        moe_router_topk: experts per token.
        moe_router_score: softmax over all experts, softmax_topk (over the chosen ones), sigmoid, or sparsemixer.
        moe_router_norm_topk: the chosen experts' weights are divided by their sum.
        moe_router_scale: factor of the chosen experts' weights.
        moe_router_groups, moe_router_group_topk: experts are chosen within the best groups (DeepSeek); 0 without.
        moe_router_group_score: how a group is scored: "top2_sum" or "max".
        moe_expert_bias: a correction is added to the scores for choosing only (DeepSeek-V3).
        moe_router_bias: the router's product has a bias (gpt-oss).
        q_lora_rank, kv_lora_rank, qk_head_dim, qk_pos_emb_head_dim, v_head_dim: latent attention (DeepSeek); a
            kv_lora_rank of 0 means ordinary attention, a q_lora_rank of 0 a plain q projection.
        mtp_num_layers: multi-token-prediction layers, which are carried through conversions.
        hf_config: HF's config.json as it was read; empty when the model came from a checkpoint without one.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    tie_word_embeddings: bool
    dtype: str
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    add_proj_bias: bool = False
    add_mlp_bias: bool = False
    rotary_base_local: float | None = None
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling: dict[str, Any] | None = None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_sinks: bool = False
    embedding_scale: float | None = None
    zero_centered_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    num_experts: int = 0
    moe_layers: tuple[int, ...] = ()
    moe_ffn_hidden_size: int = 0
    moe_shared_ffn_hidden_size: int = 0
    moe_shared_expert_gate: bool = False
    moe_router_topk: int = 0
    moe_router_score: str = "softmax"
    moe_router_norm_topk: bool = False
    moe_router_scale: float = 1.0
    moe_router_groups: int = 0
    moe_router_group_topk: int = 0
    moe_router_group_score: str = "top2_sum"
    moe_expert_bias: bool = False
    moe_router_bias: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_pos_emb_head_dim: int = 0
    v_head_dim: int = 0
    mtp_num_layers: int = 0
    hf_config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse dimensions no model can have (`InputError`)."""
        for one in fields(self):
            value = getattr(self, one.name)
            if expected := wrong_type(one.type, value):
                raise InputError(f"model config: {one.name} is {value!r:.60}, expected {expected}")
            least = 1 if one.default is MISSING else 0
            if one.type is int and value < least:
                raise InputError(f"model config: {one.name} is {value!r}, expected a positive integer")
            if one.type is int and value > MOST.get(one.name, LARGEST):
                raise InputError(f"model config: {one.name} is {value}, more than any model has")
        for name in ("rotary_base", "rotary_percent", "norm_epsilon"):
            if getattr(self, name) <= 0:
                raise InputError(f"model config: {name} is {getattr(self, name)}, expected a positive number")
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_query_groups {self.num_query_groups}"
            )
        self.check_layer_types()
        self.check_rope_scaling()

    def check_layer_types(self) -> None:
        """Each layer is full or sliding, and sliding ones have a window (`InputError`)."""
        strange = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if strange:
            raise InputError(f"model config: layer_types has {strange}; only {list(LAYER_TYPES)} are supported")
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise InputError(f"model config: {len(self.layer_types)} layer_types for {self.num_layers} layers")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise InputError(f"model config: layers slide, but sliding_window is {self.sliding_window}")

    def check_rope_scaling(self) -> None:
        """The rope scaling is of a known kind and complete (`InputError`)."""
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("rope_type")
        if kind not in ROPE_KEYS:
            raise InputError(f"model config: rope_scaling of type {kind!r} is not supported (known: {list(ROPE_KEYS)})")
        missing = [key for key in ROPE_KEYS[kind] if self.rope_scaling.get(key) is None]
        if missing:
            raise InputError(f"model config: rope_scaling of type {kind} lacks {', '.join(missing)}")

    def window(self, layer: int) -> int | None:
        """Positions a layer sees, its own included; None for all before it."""
        slides = bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    @property
    def multi_latent_attention(self) -> bool:
        """Whether keys and values come from a shared low-rank projection (DeepSeek)."""
        return self.kv_lora_rank > 0

    def has(self, feature: str, layer: int | None = None) -> bool:
        """Whether a weight table's condition holds.

        Args:
            feature: "moe" (the layer has experts) or the name of a field or property taken as a truth value; a leading
                `!` negates it.
            layer: the row's layer; None for rows outside the layers. Prediction layers count on from `num_layers`.
        """
        if feature.startswith("!"):
            return not self.has(feature[1:], layer)
        if feature == "moe":
            return layer in self.moe_layers or (
                bool(self.num_experts) and layer is not None and layer >= self.num_layers
            )
        return bool(getattr(self, feature))

    @classmethod
    def from_hf(cls, folder: str | Path) -> "ModelConfig":
        """Read `<folder>/config.json`; both older and newer transformers spellings are understood.

        Raises:
            InputError: the file is missing or broken, the family unknown, or the config asks for something the
                family page does not express.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; a Hugging Face model folder holds a config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); copy the model folder again") from error
        if not isinstance(raw, dict):
            raise InputError(f"{path}: holds a {type(raw).__name__}, expected an object")
        return cls.from_hf_dict(raw, str(path))

    @classmethod
    def from_hf_dict(cls, raw: Mapping[str, Any], where: str) -> "ModelConfig":
        """The same from a config.json already read; `where` names it in errors."""
        named = raw.get("architectures") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise InputError(f"{where}: architectures is {named!r:.60}, expected a list of class names")
        family = family_of_architecture(named, where)
        try:
            flat = flatten_hf_config(raw)
            check_required(family, flat, where)
            values: dict[str, Any] = dict(family.fixed)
            for name, origin in family.config.items():
                values[name] = hf_value(origin, flat, f"{where}: a {family.name} model")
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: a value is of the wrong type ({error}); compare it with the original"
            ) from error
        try:
            return cls(family=family.name, hf_config=dict(raw), **values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model config") -> "ModelConfig":
        """The config written by `to_dict`; `InputError` when fields are missing or unknown."""
        known = {one.name for one in fields(cls)}
        needed = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}
        missing = sorted(needed - set(values))
        strange = sorted(set(values) - known)
        if missing or strange:
            raise InputError(
                f"{where}: missing fields {missing}, unknown fields {strange}; written by another version?"
            )
        try:
            family_named(str(values["family"]))
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        except (InputError, UsageError) as error:
            raise InputError(f"{where}: {error}") from error

    def dimensions(self) -> dict[str, int]:
        """Sizes by the names weight tables use.

        vocab, hidden, ffn, head, heads; query = the attention output's width; qkv = (heads + 2 x groups) x head;
        gated = 2 x ffn, and so for experts (`expert_ffn`, `expert_gated`) and shared experts (`shared_ffn`, ...).
        Latent attention: q_lora, kv_lora, q_up = heads x (qk + rotary), kv_down = kv_lora + rotary, kv_up = heads x
        (qk + v).
        """
        heads, rotary = self.num_attention_heads, self.qk_pos_emb_head_dim
        return {
            "one": 1,
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "two_hidden": 2 * self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "gated": 2 * self.ffn_hidden_size,
            "head": self.kv_channels,
            "heads": heads,
            "query": heads * (self.v_head_dim if self.multi_latent_attention else self.kv_channels),
            "qkv": (heads + 2 * self.num_query_groups) * self.kv_channels,
            "experts": self.num_experts,
            "expert_ffn": self.moe_ffn_hidden_size,
            "expert_gated": 2 * self.moe_ffn_hidden_size,
            "shared_ffn": self.moe_shared_ffn_hidden_size,
            "shared_gated": 2 * self.moe_shared_ffn_hidden_size,
            "q_lora": self.q_lora_rank,
            "kv_lora": self.kv_lora_rank,
            "q_up": heads * (self.qk_head_dim + rotary),
            "kv_down": self.kv_lora_rank + rotary,
            "kv_up": heads * (self.qk_head_dim + self.v_head_dim),
        }


def architecture_values(config: ModelConfig) -> dict[str, Any]:
    """What each of upstream's architecture flags would have to say to describe this model."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "rotary_base": config.rotary_base,
        "norm_epsilon": config.norm_epsilon,
        "add_qkv_bias": config.add_qkv_bias,
        "add_bias_linear": config.add_proj_bias or config.add_mlp_bias,
        "disable_bias_linear": not (config.add_proj_bias or config.add_mlp_bias),
        "true_vocab_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "num_experts": config.num_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "swiglu": config.activation == "silu",
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
    }


def check_family(config: ModelConfig, options: Any, where: str) -> None:
    """`UsageError` when --model-type-hf or --spec name another family than the model's, or none at all.

    A name under which upstream converts the family is accepted; where that would lose the q/k/v biases, upstream's
    --add-qkv-bias has to be there too.

    Args:
        options: any object; an attribute that is missing or None was not given.
        where: the model's folder.
    """
    named = getattr(options, "model_type_hf", None)
    one = family_named(config.family)
    stands_for = named in one.converted_as and (not config.add_qkv_bias or getattr(options, "add_qkv_bias", False))
    if named and family_named(named).name != config.family and not stands_for:
        remedy = "add --add-qkv-bias, or leave it out" if named in one.converted_as else "leave it out"
        raise UsageError(f"--model-type-hf says {named}, {where} is {config.family}; {remedy}")
    spec = getattr(options, "spec", None)
    if spec and spec[0].rpartition(".")[2].removesuffix("_spec") not in (one.name, *one.specs):
        raise UsageError(f"--spec says {spec[0]}, {where} is {config.family}; leave it out")


def check_architecture_flags(config: ModelConfig, options: Any, where: str = "the model") -> None:
    """Hold the architecture flags that were given against the model; the flags themselves are never used.

    Args:
        config: the model's own dimensions.
        options: any object; an attribute that is missing or None was not given.
        where: where the dimensions come from (a path), for the error.

    Raises:
        UsageError: listing every flag that contradicts the model, with both values.
    """
    check_family(config, options, where)
    wrong = []
    for name, value in architecture_values(config).items():
        given = getattr(options, name, None)
        if given is not None and given != value:
            wrong.append(f"--{name.replace('_', '-')} says {given}, the model says {value}")
    padded = getattr(options, "padded_vocab_size", None)
    if padded is not None and padded < config.vocab_size:
        wrong.append(f"--padded-vocab-size says {padded}, the model has {config.vocab_size} rows")
    if wrong:
        raise UsageError(f"{'; '.join(wrong)} (read from {where}); leave these flags out, they are not needed")
