"""The truth every layout is held against: transformers' Qwen3 with peft's adapter, trained by torch's AdamW.

It is computed in float64, so that the difference to it is our rounding and not the sum of both sides'.

Also the only place of these tests that knows how megatron-core's tensors lie relative to transformers': written here
from the layouts' definitions, on purpose without the package's weight tables.

Shapes: v vocabulary, h hidden, n query heads, g key-value heads, d head dimension, f ffn, r LoRA rank, m positions.
"""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.distributed.cases import CLIP, EPSILON, LEARNING_RATE, SIZES, STEPS, WEIGHT_DECAY, Arrays
from tests.distributed.double import InDouble, in_double

IGNORE = -100
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# One global batch of four micro-batches: for each, (real tokens, first labelled position) of its rows. The lengths are
# even, as sequence parallelism over two ranks needs; every other micro-batch goes to one of two DP ranks, whose token
# counts therefore differ.
ROWS = (((6, 2), (5, 4)), ((10, 1), (3, 1)), ((4, 3), (4, 0)), ((14, 5), (9, 2)))
PADDED_LENGTH = 16

SEED = 34
"""Of the model's values: taken because transformers' own float32 keeps within half of the tolerance with it, in every
gradient; a test says so."""

MicroBatch = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Reference:
    """What training gives in one process.

    Attributes:
        folder: the HF model before training; adapter: LoRA factors by our names ({} in full tuning).
        steps: global batches: for each step its micro-batches {"tokens", "labels", "real"}, each [b, s].
        logits: per micro-batch of the first step, [m, v] of its real positions, position by position.
        gradients: of the first step, by our names.
        losses, norms: of every step; the norm before clipping.
        trained: trainable tensors after the last step, by our names.
    """

    folder: Path
    adapter: Arrays
    steps: tuple[tuple[MicroBatch, ...], ...]
    logits: tuple[numpy.ndarray, ...]
    gradients: Arrays
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    trained: Arrays


def global_batches(ragged: bool) -> tuple[tuple[MicroBatch, ...], ...]:
    """Random tokens; labels are set from each row's first labelled position on, padding is on the right."""
    generator = numpy.random.default_rng(11)
    steps = []
    for _ in range(STEPS):
        step = []
        for rows in ROWS:
            length = max(real for real, _ in rows) if ragged else PADDED_LENGTH
            length += length % 2
            tokens = generator.integers(0, SIZES.vocab, (len(rows), length))
            labels = generator.integers(0, SIZES.vocab, (len(rows), length))
            real = numpy.zeros((len(rows), length), dtype=bool)
            for i, (end, start) in enumerate(rows):
                real[i, :end] = True
                tokens[i, end:] = 0
                labels[i, :start] = labels[i, end:] = IGNORE
            step.append({"tokens": tokens, "labels": labels, "real": real})
        steps.append(tuple(step))
    return tuple(steps)


def build_model(tied: bool) -> Qwen3ForCausalLM:
    """A Qwen3 with every parameter redrawn: untouched ones would be zeros and ones that hide mistakes."""
    config = Qwen3Config(
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.ffn,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.groups,
        head_dim=SIZES.head,
        vocab_size=SIZES.vocab,
        max_position_embeddings=64,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        dtype="float32",
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if parameter.dim() == 1 else 0.15 * drawn)
    return model.eval()


def add_adapter(model: Qwen3ForCausalLM) -> torch.nn.Module:
    """peft's LoRA on every linear layer, B not zero; q, k, v share one A as our fused layer does, gate and up too."""
    settings = LoraConfig(r=SIZES.rank, lora_alpha=SIZES.alpha, target_modules=list(ADAPTED), lora_dropout=0.0)
    adapted = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for follower, leader in ((attention.k_proj, attention.q_proj), (attention.v_proj, attention.q_proj)):
            follower.lora_A.default.weight = leader.lora_A.default.weight
        mlp.up_proj.lora_A.default.weight = mlp.gate_proj.lora_A.default.weight
    return adapted


def by_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[n d, x], [g d, x], [g d, x] -> [(n + 2 g) d, x]: for each group its queries, then its key, then its value."""
    each = SIZES.query // SIZES.groups
    parts = []
    for group in range(SIZES.groups):
        parts.append(q[group * each : (group + 1) * each])
        parts += [one[group * SIZES.head : (group + 1) * SIZES.head] for one in (k, v)]
    return torch.cat(parts)


def by_our_names(model: Qwen3ForCausalLM, lora: bool, gradients: bool) -> Arrays:
    """The trainable tensors, or their gradients, named and laid out as megatron-core's unsplit ones."""

    def take(module: torch.nn.Module, factor: str = "") -> torch.Tensor:
        weight = getattr(module, factor).default.weight if factor else module.weight
        return (weight.grad if gradients else weight).detach().clone()

    found: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        name, attention, mlp = f"decoder.layers.{number}.", layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        if lora:
            for ours, a in (("linear_qkv", q), ("linear_proj", attention.o_proj)):
                found[f"{name}self_attention.{ours}.lora_A.weight"] = take(a, "lora_A")
            for ours, a in (("linear_fc1", mlp.gate_proj), ("linear_fc2", mlp.down_proj)):
                found[f"{name}mlp.{ours}.lora_A.weight"] = take(a, "lora_A")
        factor, ending = ("lora_B", ".lora_B.weight") if lora else ("", ".weight")
        found[f"{name}self_attention.linear_qkv{ending}"] = by_groups(take(q, factor), take(k, factor), take(v, factor))
        found[f"{name}self_attention.linear_proj{ending}"] = take(attention.o_proj, factor)
        found[f"{name}mlp.linear_fc1{ending}"] = torch.cat([take(mlp.gate_proj, factor), take(mlp.up_proj, factor)])
        found[f"{name}mlp.linear_fc2{ending}"] = take(mlp.down_proj, factor)
        if not lora:
            found[f"{name}input_layernorm.weight"] = take(layer.input_layernorm)
            found[f"{name}pre_mlp_layernorm.weight"] = take(layer.post_attention_layernorm)
            found[f"{name}self_attention.q_layernorm.weight"] = take(attention.q_norm)
            found[f"{name}self_attention.k_layernorm.weight"] = take(attention.k_norm)
    if not lora:
        found["embedding.word_embeddings.weight"] = take(model.model.embed_tokens)
        found["decoder.final_layernorm.weight"] = take(model.model.norm)
        if not model.config.tie_word_embeddings:
            found["output_layer.weight"] = take(model.lm_head)
    return {name: value.numpy() for name, value in found.items()}


def forward(model: torch.nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """-> (logits [b, s, v], sum of losses, trained tokens)."""
    tokens, labels, real = (torch.as_tensor(batch[key]) for key in ("tokens", "labels", "real"))
    with InDouble():  # nothing where the model is not in float64
        logits = model(input_ids=tokens, attention_mask=real.long()).logits
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return logits, total, int((labels != IGNORE).sum())


def optimizer_of(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; vectors (norms) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=EPSILON)


@cache
def saved_model(tied: bool) -> Path:
    """The untrained base as a Hugging Face folder, kept until the tests end."""
    holder = tempfile.TemporaryDirectory(prefix="base-")
    _holders.append(holder)
    build_model(tied).save_pretrained(holder.name)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory[str]] = []


def first_gradients_in_float32(tied: bool, lora: bool, ragged: bool) -> Arrays:
    """What transformers and peft themselves make of the first global batch in float32."""
    base, step = build_model(tied), global_batches(ragged)[0]
    model = add_adapter(base) if lora else base
    for batch in step:
        _, total, count = forward(model, batch)
        (total / count / len(step)).backward()
    return by_our_names(base, lora, True)


@cache
def reference(tied: bool = False, lora: bool = True, ragged: bool = True, per_token: bool = False) -> Reference:
    """Train the reference; the loss of a step is the mean over its micro-batches of their means, or per token."""
    base = in_double(build_model(tied))
    model: Any = add_adapter(base) if lora else base
    in_double(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adapter = {name: value.astype("float32") for name, value in by_our_names(base, True, False).items()} if lora else {}
    optimizer = optimizer_of(parameters)
    steps = global_batches(ragged)
    logits: list[numpy.ndarray] = []
    gradients: Arrays = {}
    losses, norms = [], []
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        counts = sum(int((batch["labels"] != IGNORE).sum()) for batch in step)
        loss = torch.zeros(())
        for batch in step:
            out, total, count = forward(model, batch)
            loss = loss + (total / counts if per_token else total / count / len(step))
            if number == 0:
                real = torch.as_tensor(batch["real"]).t()
                logits.append(out.detach().transpose(0, 1)[real].numpy())
        loss.backward()
        if number == 0:
            gradients = by_our_names(base, lora, True)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        losses.append(float(loss))
        optimizer.step()
    trained = by_our_names(base, lora, False)
    return Reference(saved_model(tied), adapter, steps, tuple(logits), gradients, tuple(losses), tuple(norms), trained)
