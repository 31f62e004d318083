"""The truth for models with experts: transformers' with peft's adapter, experts included, trained by torch's AdamW.

peft adapts the blocks that hold all experts of a layer (`target_parameters`): one A and one B per expert, gate and up
together, which is our form. The load-balancing loss, which transformers defines otherwise, is written here from Switch
Transformer's definition, layer by layer, on the scores of transformers' own routers.

Shapes: e experts, h hidden, f ffn of an expert, r LoRA rank, k experts per token, t real tokens.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from peft import LoraConfig, get_peft_model

from tests.distributed import reference as dense
from tests.distributed.cases import CLIP, SIZES, STEPS, Arrays, Case, Sizes
from tests.distributed.double import in_double
from tests.distributed.reference import IGNORE, MicroBatch, Reference
from tests.models.tiny_moe import ATTENTION, LATENT, QWEN_MOE, SHARED_MOE, SIGMOID_MOE, Tiny, build, tiny

LAYERS = {"num_hidden_layers": 4}
MODELS: dict[str, Tiny] = {
    "qwen3-moe": tiny("train-qwen3-moe", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, LAYERS, norm_topk_prob=True),
    "qwen3-moe-late": tiny(
        "train-qwen3-moe-late", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, LAYERS, mlp_only_layers=[0, 1]
    ),
    "mixtral": tiny("train-mixtral", "MixtralConfig", ATTENTION, LAYERS, num_local_experts=6, num_experts_per_tok=2),
    "glm4-moe": tiny("train-glm4-moe", "Glm4MoeConfig", ATTENTION, SIGMOID_MOE, LAYERS, use_qk_norm=True),
    "deepseek-v3": tiny("train-deepseek-v3", "DeepseekV3Config", LATENT, SIGMOID_MOE, LAYERS, q_lora_rank=16),
    "deepseek-v2": tiny(
        "train-deepseek-v2", "DeepseekV2Config", LATENT, SIGMOID_MOE, LAYERS, q_lora_rank=None, n_group=1, topk_group=1
    ),
    "qwen2-moe": tiny("train-qwen2-moe", "Qwen2MoeConfig", ATTENTION, SHARED_MOE, LAYERS),
    "gpt-oss": tiny(
        "train-gpt-oss", "GptOssConfig", ATTENTION, LAYERS, num_local_experts=6, num_experts_per_tok=3, sliding_window=5
    ),
}  # fmt: skip
DRAWS = {
    "qwen3-moe": (9, 0.8),
    "qwen3-moe-late": (6, 0.8),
    "mixtral": (4, 0.4),
    "glm4-moe": (4, 0.8),
    "deepseek-v3": (9, 0.4),
    "deepseek-v2": (5, 0.4),
    "qwen2-moe": (18, 0.8),
    "gpt-oss": (9, 0.4),
}
"""Seed of a model's values and factor of its layers' matrices. The gradients of an expert that few tokens reach can all
but cancel, and float32 then leaves no five digits of them, whoever computes. These draws were taken because
transformers' own float32 keeps within half of the tolerance with them, and so does float64 whose weights are changed by
float32's rounding; a test says the former."""
MOE_SIZES = Sizes(layers=4, hidden=40, ffn=44, heads=6, groups=2, head=12, vocab=61)
PLAIN = (  # ours, and transformers' modules of which ours is made; their adapters share one A
    ("self_attention.linear_proj", ("self_attn.o_proj",)),
    ("self_attention.linear_q_proj", ("self_attn.q_proj",)),
    ("self_attention.linear_q_down_proj", ("self_attn.q_a_proj",)),
    ("self_attention.linear_q_up_proj", ("self_attn.q_b_proj",)),
    ("self_attention.linear_kv_down_proj", ("self_attn.kv_a_proj_with_mqa",)),
    ("self_attention.linear_kv_up_proj", ("self_attn.kv_b_proj",)),
    (
        "self_attention.linear_qkv",
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
        ),
    ),
    (
        "mlp.linear_fc1",
        (
            "mlp.gate_proj",
            "mlp.up_proj",
        ),
    ),
    ("mlp.linear_fc2", ("mlp.down_proj",)),
    (
        "mlp.shared_experts.linear_fc1",
        (
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
        ),
    ),
    ("mlp.shared_experts.linear_fc2", ("mlp.shared_experts.down_proj",)),
    ("mlp.shared_experts.linear_fc1", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    ("mlp.shared_experts.linear_fc2", ("mlp.shared_expert.down_proj",)),
)
ROUTER = "mlp.gate"
EXPERTS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}


def sizes_of(case: Case) -> Sizes:
    """The dimensions of a case's model."""
    return SIZES if case.model == "qwen3" else MOE_SIZES


def global_batches() -> tuple[tuple[MicroBatch, ...], ...]:
    """`reference.global_batches` in another vocabulary and in lengths that divide by four, as CP2 x TP2 needs."""
    steps = []
    for step in dense.global_batches(True):
        batches = []
        for batch in step:
            more = -batch["tokens"].shape[1] % 4
            padded = {
                key: numpy.pad(value, ((0, 0), (0, more)), constant_values=IGNORE if key == "labels" else 0)
                for key, value in batch.items()
            }
            for key in ("tokens", "labels"):
                padded[key] = numpy.where(padded[key] >= 0, padded[key] % MOE_SIZES.vocab, padded[key])
            batches.append(padded)
        steps.append(tuple(batches))
    return tuple(steps)


def build_model(name: str) -> Any:
    """The model as the parity tests draw it, of the seed in `DRAWS` and with its layers' matrices made smaller."""
    seed, factor = DRAWS[name]
    model = build(MODELS[name], seed=seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ".layers." in parameter_name and "gate.weight" not in parameter_name:
                parameter.mul_(factor)
    return model


@cache
def saved_model(name: str) -> Path:
    """The untrained base as a Hugging Face folder, kept until the tests end."""
    holder = tempfile.TemporaryDirectory(prefix="moe-base-")
    _holders.append(holder)
    build_model(name).save_pretrained(holder.name)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory[str]] = []


def layers_of(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """(our prefix, transformers' layer)."""
    for number, layer in enumerate(model.model.layers):
        yield f"decoder.layers.{number}.", layer


def submodule(layer: torch.nn.Module, name: str) -> Any:
    """A part of a layer, or None."""
    for part in name.split("."):
        layer = getattr(layer, part, None)
    return layer


def add_adapter(model: Any, lookups: bool = False) -> Any:
    """peft's LoRA on every linear layer and every expert, B not zero; what our layers fuse shares one A.

    Args:
        lookups: on the routers, which are parameters to peft, and on the token embeddings too.
    """
    linear = tuple(f".{name}" for _, names in PLAIN for name in names)
    linear += (".embed_tokens",) * lookups
    settings = LoraConfig(
        r=SIZES.rank,
        lora_alpha=SIZES.alpha,
        target_modules=[name for name, _ in model.named_modules() if name.endswith(linear)],
        target_parameters=[f"mlp.experts.{name}" for name in EXPERTS.values()] + [f"{ROUTER}.weight"] * lookups,
    )
    # by the type, peft would take names of dense layers for the experts' blocks, and double their rank
    with mock.patch.object(type(model.config), "model_type", "tiny"):
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for _, layer in layers_of(model):
        for _, (leader, *followers) in PLAIN:
            for follower in followers:
                if submodule(layer, f"{leader}.lora_A") is not None and submodule(layer, follower) is not None:
                    submodule(layer, follower).lora_A.default.weight = submodule(layer, leader).lora_A.default.weight
    return adapted


def expert_wrappers(layer: torch.nn.Module) -> dict[str, Any]:
    """peft's wrappers of a layer's expert blocks by our name; {} for a dense layer."""
    found, module = {}, submodule(layer, "mlp.experts")
    while getattr(module, "parameter_name", None):
        found[next(ours for ours, theirs in EXPERTS.items() if theirs == module.parameter_name)] = module
        module = module.base_layer
    return found


def experts_by_name(prefix: str, layer: torch.nn.Module, take: Any) -> dict[str, torch.Tensor]:
    """Every expert's factors: A [e r, i] is expert by expert, B [o, r e] has the experts of each r side by side."""
    found = {}
    for ours, wrapper in expert_wrappers(layer).items():
        count = wrapper.num_experts
        a, b = take(wrapper.lora_A.default.weight), take(wrapper.lora_B.default.weight)
        a, b = a.reshape(count, -1, a.size(-1)), b.reshape(b.size(0), -1, count)
        if getattr(submodule(layer, "mlp.experts").get_base_layer(), "is_transposed", False) and ours == "linear_fc1":
            b = torch.cat([b[0::2], b[1::2]])  # gate and up take turns
        for expert in range(count):
            name = f"{prefix}mlp.experts.local_experts.{expert}.{ours}"
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = a[expert], b[:, :, expert]
    return found


def adapter_by_name(model: Any, gradients: bool) -> Arrays:
    """The factors, or their gradients, by our names and in our layout."""

    def take(weight: torch.Tensor) -> torch.Tensor:
        return (weight.grad if gradients else weight).detach().clone()

    found: dict[str, torch.Tensor] = {}
    for prefix, layer in layers_of(model):
        for ours, names in PLAIN:
            parts = [submodule(layer, name) for name in names]
            split = ours.endswith("linear_q_proj") and submodule(layer, "self_attn.k_proj") is not None
            if split or any(part is None or not hasattr(part, "lora_A") for part in parts):
                continue
            found[f"{prefix}{ours}.lora_A.weight"] = take(parts[0].lora_A.default.weight)
            rows = [take(part.lora_B.default.weight) for part in parts]
            found[f"{prefix}{ours}.lora_B.weight"] = by_groups(*rows) if len(rows) == 3 else torch.cat(rows)
        found |= experts_by_name(prefix, layer, take)
        if hasattr(router := submodule(layer, ROUTER), "lora_A"):
            found[f"{prefix}mlp.router.lora_A.weight"] = take(router.lora_A.default.weight)
            found[f"{prefix}mlp.router.lora_B.weight"] = take(router.lora_B.default.weight)
    if hasattr(table := model.model.embed_tokens, "lora_embedding_A"):
        found["embedding.word_embeddings.lora_A.weight"] = take(table.lora_embedding_B.default).t()
        found["embedding.word_embeddings.lora_B.weight"] = take(table.lora_embedding_A.default).t()
    return {name: value.numpy() if gradients else value.float().numpy() for name, value in found.items()}


def by_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of q, k and v: for each group its queries, then its key, then its value."""
    groups = MOE_SIZES.groups
    return torch.cat([torch.cat(parts) for parts in zip(*(one.chunk(groups) for one in (q, k, v)), strict=True)])


def weights_by_name(model: Any, gradients: bool) -> Arrays:
    """All weights of a Qwen3-MoE, or their gradients, by our names and in our layout."""

    def take(weight: torch.Tensor) -> torch.Tensor:
        return (weight.grad if gradients else weight).detach().clone()

    found = {"embedding.word_embeddings.weight": take(model.model.embed_tokens.weight)}
    for prefix, layer in layers_of(model):
        attention, mlp = layer.self_attn, layer.mlp
        found[f"{prefix}self_attention.linear_qkv.weight"] = by_groups(
            *(take(one.weight) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
        )
        found[f"{prefix}self_attention.linear_proj.weight"] = take(attention.o_proj.weight)
        found[f"{prefix}self_attention.q_layernorm.weight"] = take(attention.q_norm.weight)
        found[f"{prefix}self_attention.k_layernorm.weight"] = take(attention.k_norm.weight)
        found[f"{prefix}input_layernorm.weight"] = take(layer.input_layernorm.weight)
        found[f"{prefix}pre_mlp_layernorm.weight"] = take(layer.post_attention_layernorm.weight)
        found[f"{prefix}mlp.router.weight"] = take(mlp.gate.weight)
        for ours, theirs in EXPERTS.items():
            for expert, value in enumerate(take(getattr(mlp.experts, theirs))):
                found[f"{prefix}mlp.experts.local_experts.{expert}.{ours}.weight"] = value
    found["decoder.final_layernorm.weight"] = take(model.model.norm.weight)
    found["output_layer.weight"] = take(model.lm_head.weight)
    return {name: value.numpy() for name, value in found.items()}


def routers_by_name(model: Any, gradients: bool) -> Arrays:
    """The routers' weights, or their gradients, by our names."""
    gates = ((prefix, submodule(layer, "mlp.gate.weight")) for prefix, layer in layers_of(model))
    kept = {f"{prefix}mlp.router.weight": weight.grad if gradients else weight for prefix, weight in gates}
    return {name: value.detach().clone().numpy() for name, value in kept.items()}


@contextmanager
def router_logits(model: Any) -> Iterator[list[torch.Tensor]]:
    """The logits [rows x length, e] of every router, in the order of the layers, of the calls made meanwhile."""
    seen: list[torch.Tensor] = []
    hooks = []
    for _, layer in layers_of(model):
        gate = submodule(layer, ROUTER)
        if gate is not None and hasattr(layer.mlp, "experts"):

            def keep(module: torch.nn.Module, args: Any) -> None:
                adapted = hasattr(module, "lora_A")
                weight = module.base_layer.weight + module.get_delta_weight("default") if adapted else module.weight
                seen.append(args[0].flatten(0, -2) @ weight.t())

            hooks.append(gate.register_forward_pre_hook(keep))
    yield seen
    for hook in hooks:
        hook.remove()


def balancing(logits: torch.Tensor, real: torch.Tensor, k: int) -> torch.Tensor:
    """e x sum over experts of (share of the choices) x (mean score), over the real tokens."""
    scores = logits[real.flatten()].softmax(-1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)
    return scores.size(-1) * (chosen.mean(0) / k * scores.mean(0)).sum()


def losses_on_routers(model: Any, logits: list[torch.Tensor], batch: MicroBatch, case: Case) -> torch.Tensor:
    """The load-balancing and the z loss of a micro-batch, with their coefficients."""
    real, k = torch.as_tensor(batch["real"]), model.config.num_experts_per_tok
    total = torch.zeros(())
    for one in logits:
        apart = zip(one.unflatten(0, real.shape), real, strict=True)
        rows = [balancing(a, b, k) for a, b in apart] if case.balance_rows else [balancing(one, real, k)]
        total = total + case.balance * torch.stack(rows).mean()
        total = total + case.z_loss * one[real.flatten()].logsumexp(-1).square().mean()
    return total


def first_gradients_in_float32(name: str) -> Arrays:
    """What transformers and peft themselves make of the first global batch in float32."""
    base = build_model(name)
    model, step = add_adapter(base), global_batches()[0]
    for batch in step:
        _, total, count = dense.forward(model, batch)
        (total / count / len(step)).backward()
    return adapter_by_name(base, True)


@cache
def moe_reference(case: Case) -> Reference:
    """Train the reference in float64; see `reference.reference`.

    Args:
        case: of its fields only what changes the numbers: model, lora, per_token, and the losses on routers.
    """
    base = in_double(build_model(case.model))
    model: Any = add_adapter(base, case.lookups) if case.lora else base

    def named(trained: Any, gradients: bool) -> Arrays:
        """What the case trains, or its gradients."""
        if not case.lora:
            return weights_by_name(trained, gradients)
        routers = routers_by_name(trained, gradients) if case.routers else {}
        return adapter_by_name(trained, gradients) | routers

    in_double(model)
    if case.routers:
        for _, layer in layers_of(base):
            layer.mlp.gate.weight.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adapter = adapter_by_name(base, False) if case.lora else {}
    optimizer, steps = dense.optimizer_of(parameters), global_batches()
    logits: list[numpy.ndarray] = []
    gradients: Arrays = {}
    losses, norms = [], []
    for number, step in enumerate(steps[:STEPS]):
        optimizer.zero_grad()
        counts = sum(int((batch["labels"] != IGNORE).sum()) for batch in step)
        reported, wanted = 0.0, torch.zeros(())
        for batch in step:
            with router_logits(base) as seen:
                out, total, count = dense.forward(model, batch)
            loss = total / counts if case.per_token else total / count / len(step)
            reported += float(loss.detach())
            wanted = wanted + loss
            if case.balance or case.z_loss:
                wanted = wanted + losses_on_routers(base, seen, batch, case) / len(step)
            if number == 0:
                logits.append(out.detach().transpose(0, 1)[torch.as_tensor(batch["real"]).t()].numpy())
        wanted.backward()
        if number == 0:
            gradients = named(base, True)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        losses.append(reported)
        optimizer.step()
    trained = named(base, False)
    return Reference(
        saved_model(case.model), adapter, steps, tuple(logits), gradients, tuple(losses), tuple(norms), trained
    )
