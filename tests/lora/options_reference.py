"""What peft computes with each LoRA option, in float64, named and laid out as megatron-core's whole tensors."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from mindspeed_llm.arguments.lora import LoraOptions
from tests.distributed import moe_reference
from tests.distributed.cases import CLIP, EPSILON, LEARNING_RATE, SIZES, WEIGHT_DECAY, Arrays
from tests.distributed.double import in_double
from tests.distributed.moe_reference import by_groups
from tests.distributed.reference import ADAPTED, build_model, forward, global_batches, saved_model

QKV, ALL = ["q_proj", "k_proj", "v_proj"], list(ADAPTED)


@dataclass(frozen=True, eq=False)
class Option:
    """One use of options: in our words and in peft's.

    Attributes:
        name: of the test. ours: fields of `LoraOptions` beside rank, alpha and targets.
        peft: fields of peft's LoraConfig beside them. targets: HF names, for both.
        ratio: LoRA+'s, or None. tied: the base's output layer is its embedding.
        fresh: our own initial values are held against peft's. model: "qwen3", or one of `moe_reference.MODELS`.
    """

    name: str
    ours: dict[str, Any]
    peft: dict[str, Any]
    targets: tuple[str, ...] = ADAPTED
    ratio: float | None = None
    fresh: bool = False
    tied: bool = False
    model: str = "qwen3"

    @property
    def folder(self) -> Path:
        """The base as an HF folder."""
        return saved_model(self.tied) if self.model == "qwen3" else moe_reference.saved_model(self.model)

    def steps(self) -> tuple:
        """Two global batches."""
        return (global_batches(True) if self.model == "qwen3" else moe_reference.global_batches())[:2]

    def options(self) -> LoraOptions:
        """As the command line gives them."""
        return LoraOptions(
            lora_r=SIZES.rank, lora_alpha=SIZES.alpha, lora_target_modules=list(self.targets), **self.ours
        )


OPTIONS = {
    option.name: option
    for option in (
        Option("dora", {"use_dora": True}, {"use_dora": True}),
        Option(
            "rslora-with-patterns",
            {
                "use_rslora": True,
                "lora_rank_pattern": ["linear_qkv=5", r".*layers\.1\.mlp\.down_proj=2"],
                "lora_alpha_pattern": ["linear_fc1=9", "down_proj=3.5"],
            },
            {
                "use_rslora": True,
                "rank_pattern": {**dict.fromkeys(QKV, 5), r"layers\.1\.mlp\.down_proj": 2},
                "alpha_pattern": {"gate_proj": 9, "up_proj": 9, "down_proj": 3.5},
            },
        ),
        Option(
            "some-layers-of-all-linear",
            {"lora_layers": [1, 3], "lora_exclude_modules": ["o_proj"]},
            {"layers_to_transform": [1, 3], "exclude_modules": ["o_proj"], "target_modules": ALL},
            ("all-linear",),
        ),
        Option(
            "dora-and-whole-modules",
            {"use_dora": True, "lora_modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
            {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
        ),
        Option("loraplus", {"loraplus_lr_ratio": 8.0}, {}, ratio=8.0),
        Option(
            "pissa",
            {"lora_init": "pissa"},
            {"init_lora_weights": "pissa"},
            ("o_proj", "down_proj"),
            fresh=True,
        ),
        Option("some-projections", {}, {}, ("q_proj", "v_proj", "up_proj")),
        Option("dora-of-a-projection", {"use_dora": True}, {"use_dora": True}, ("v_proj", "gate_proj", "o_proj")),
        Option(
            "pissa-of-a-projection",
            {"lora_init": "pissa"},
            {"init_lora_weights": "pissa"},
            ("v_proj", "gate_proj"),
            fresh=True,
        ),
        Option("embedding", {"use_rslora": True}, {"use_rslora": True}, ("embed_tokens", "down_proj")),
        Option("tied-embedding-and-loraplus", {}, {}, ("embed_tokens", "o_proj"), ratio=8.0, tied=True),
    )
}
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SPREAD = {
    option.name: option
    for option in (
        Option("dora", {"use_dora": True}, {"use_dora": True}, (*QKV, "o_proj"), model="qwen3-moe"),
        Option(
            "pissa",
            {"lora_init": "pissa"},
            {"target_modules": ["o_proj"], "target_parameters": list(EXPERTS)},
            ("o_proj", r".*\.local_experts\..*"),
            fresh=True,
            model="qwen3-moe",
        ),
    )
}
"""Options on a model with experts, for layouts that spread it and cut sequences."""


@dataclass(frozen=True)
class Truth:
    """Attributes as in `tests.distributed.reference.Reference`."""

    adapter: Arrays
    logits: tuple[Any, ...]
    gradients: Arrays
    losses: tuple[float, ...]
    trained: Arrays = field(default_factory=dict)


def adapted(option: Option) -> torch.nn.Module:
    """peft's model with values of its own in every adapter; a fused layer's parts share one A."""
    # peft decomposes float32 weights only
    model = build_model(option.tied) if option.model == "qwen3" else moe_reference.build_model(option.model)
    common = {"r": SIZES.rank, "lora_alpha": SIZES.alpha, "target_modules": list(option.targets)}
    with mock.patch.object(type(model.config), "model_type", "tiny"):  # see moe_reference.add_adapter
        peft = in_double(get_peft_model(model, LoraConfig(**{**common, **option.peft}), autocast_adapter_dtype=False))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name and not option.fresh:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if parameter.requires_grad:
                parameter.copy_(parameter.float())
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            dense = [(mlp.gate_proj, mlp.up_proj)] if hasattr(mlp, "gate_proj") else []
            for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), *dense):
                sharing = [part for part in parts if hasattr(part, "lora_A")]
                for follower in sharing[1:]:
                    follower.lora_A.default.weight = sharing[0].lora_A.default.weight
            if option.fresh and not dense:
                take_out_the_principal_part(layer)
            for module in (*attention.children(), *mlp.children()) if option.fresh and dense else ():
                if hasattr(module, "lora_A"):
                    flip(module.lora_A.default.weight, module.lora_B.default.weight)
    return peft


def take_out_the_principal_part(layer: torch.nn.Module) -> None:
    """PiSSA of an attention's output projection and of every expert, which peft does not decompose."""
    scaling = SIZES.alpha / SIZES.rank
    attention = layer.self_attn.o_proj
    places = [(attention.base_layer.weight, attention.lora_A.default.weight, attention.lora_B.default.weight)]
    for wrapper in moe_reference.expert_wrappers(layer).values():
        count, a, b = wrapper.num_experts, wrapper.lora_A.default.weight, wrapper.lora_B.default.weight
        each = a.view(count, -1, a.size(-1)), b.view(b.size(0), -1, count).permute(2, 0, 1)
        places += zip(wrapper.get_param(), *each, strict=True)
    for weight, a, b in places:
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        roots = (s[: SIZES.rank] / scaling).sqrt()
        a.copy_(v[: SIZES.rank] * roots[:, None])
        b.copy_(u[:, : SIZES.rank] * roots)
        flip(a, b)
        weight -= scaling * b @ a


def flip(a: torch.Tensor, b: torch.Tensor) -> None:
    """Choose the free sign of every singular vector: the largest value of A's row is positive."""
    signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    a.mul_(signs)
    b.mul_(signs.t())


def take(model: torch.nn.Module, gradients: bool) -> Arrays:
    """Every trainable tensor, or its gradient, by our names."""
    found: dict[str, torch.Tensor] = {}

    def value(parameter: torch.nn.Parameter) -> torch.Tensor:
        return (parameter.grad if gradients else parameter).detach().clone()

    def whole(name: str, module: torch.nn.Module) -> None:
        copy = getattr(module, "modules_to_save", None)
        if copy is not None:
            found[name] = value(copy.default.weight)

    def lengths(part: torch.nn.Module) -> torch.Tensor:
        if hasattr(part, "lora_A"):
            return value(part.lora_magnitude_vector.default.weight)
        return torch.zeros(part.out_features) if gradients else part.weight.detach().norm(dim=1)

    def factors(name: str, parts: list[torch.nn.Module], join: Any) -> None:
        adapted = [part for part in parts if hasattr(part, "lora_A")]
        if not adapted:
            return
        a = value(adapted[0].lora_A.default.weight)
        found[f"{name}.lora_A.weight"] = a
        rows = (
            value(part.lora_B.default.weight) if part in adapted else a.new_zeros(part.out_features, len(a))
            for part in parts
        )
        found[f"{name}.lora_B.weight"] = join(*rows)
        if "default" in adapted[0].lora_magnitude_vector:
            found[f"{name}.lora_magnitude_vector.weight"] = join(*map(lengths, parts))

    for number, layer in enumerate(model.model.layers):
        name, attention, mlp = f"decoder.layers.{number}", layer.self_attn, layer.mlp
        factors(f"{name}.self_attention.linear_qkv", [attention.q_proj, attention.k_proj, attention.v_proj], by_groups)
        factors(f"{name}.self_attention.linear_proj", [attention.o_proj], lambda one: one)
        if hasattr(mlp, "gate_proj"):
            factors(f"{name}.mlp.linear_fc1", [mlp.gate_proj, mlp.up_proj], lambda *both: torch.cat(both))
            factors(f"{name}.mlp.linear_fc2", [mlp.down_proj], lambda one: one)
        found |= moe_reference.experts_by_name(f"{name}.", layer, value)
        whole(f"{name}.input_layernorm.weight", layer.input_layernorm)
    whole("embedding.word_embeddings.weight", model.model.embed_tokens)
    if hasattr(table := model.model.embed_tokens, "lora_embedding_A"):
        found["embedding.word_embeddings.lora_A.weight"] = value(table.lora_embedding_B.default).t()
        found["embedding.word_embeddings.lora_B.weight"] = value(table.lora_embedding_A.default).t()
    whole("output_layer.weight", model.lm_head)
    return {name: tensor.numpy() for name, tensor in found.items()}


def optimizer_of(peft: torch.nn.Module, ratio: float | None) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone; peft's LoRA+ with a ratio."""
    if ratio is not None:
        kwargs = {"lr": LEARNING_RATE, "loraplus_lr_embedding": LEARNING_RATE, "loraplus_lr_ratio": ratio}
        kwargs |= {"loraplus_weight_decay": WEIGHT_DECAY, "eps": EPSILON}
        return create_loraplus_optimizer(peft, torch.optim.AdamW, **kwargs)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=EPSILON)


@cache
def truth(option: Option) -> Truth:
    """Two steps of peft's model with an option: the first's logits and gradients, both losses."""
    peft = adapted(option)
    model: Any = peft.get_base_model()
    adapter = {key: value.astype("float32") for key, value in take(model, False).items()}
    optimizer = optimizer_of(peft, option.ratio)
    logits, losses, gradients = [], [], {}
    steps = option.steps()
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for batch in step:
            out, total, count = forward(peft, batch)
            loss = loss + total / count / len(step)
            if number == 0:
                logits.append(out.detach().transpose(0, 1)[torch.as_tensor(batch["real"]).t()].numpy())
        loss.backward()
        if number == 0:
            gradients = take(model, True)
        torch.nn.utils.clip_grad_norm_([p for p in peft.parameters() if p.requires_grad], CLIP)
        losses.append(float(loss.detach()))
        optimizer.step()
    return Truth(adapter, tuple(logits), gradients, tuple(losses))
