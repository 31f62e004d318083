"""The processes of the accelerator benchmark: checks on a small model, our training step, and a peer's."""

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pairs import READY, channel, machine

TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
PEERS = {"sdpa": "sdpa", "flash": "flash_attention_2"}
"""Peers by their attention: transformers' name for it. flash needs the package flash-attn."""
FORMS = {"modular": (False, False), "fused": (True, False), "fused MLP": (True, True)}
"""Form: (fused, whole MLP)."""
Step = Callable[[], float]


@dataclass(frozen=True)
class Job:
    """What is timed; the defaults are Qwen3-8B's shape.

    Attributes:
        length: tokens of a sequence. rows: that are packed into it. sequences: micro-batches of a step.
    """

    layers: int = 36
    hidden: int = 4096
    ffn: int = 12288
    heads: int = 32
    groups: int = 8
    head: int = 128
    vocab: int = 151936
    length: int = 2048
    rows: int = 8
    sequences: int = 4
    rank: int = 16
    alpha: int = 32
    dtype: str = "bfloat16"

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of the rows of a sequence: unequal, the same in every one."""
        cuts = np.cumsum(np.random.default_rng(0).dirichlet(np.full(self.rows, 3.0)))[:-1]
        bounds = [0, *(round(cut * self.length) for cut in cuts), self.length]
        return [max(end - begin, 0) for begin, end in zip(bounds, bounds[1:], strict=False) if end > begin]


SMALL = Job(2, 96, 160, 6, 2, 16, 211, 120, 5, 1, 4, 12, "float32")
"""Of the checks: unequal sizes, some of them odd."""


def hf_config(job: Job) -> Any:
    """transformers' configuration of a job's model."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=job.vocab,
        hidden_size=job.hidden,
        intermediate_size=job.ffn,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        num_key_value_heads=job.groups,
        head_dim=job.head,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )


def sequences(job: Job) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, labels) of every micro-batch: labels shifted, none at the end of a row."""
    random, made = np.random.default_rng(1), []
    for _ in range(job.sequences):
        tokens = random.integers(0, job.vocab, job.length)
        labels = np.append(tokens[1:], -100)
        labels[np.cumsum(job.row_lengths) - 1] = -100
        made.append((tokens, labels))
    return made


def batches(job: Job, place: Any, packed: bool) -> list[dict[str, Any]]:
    """Micro-batches as `training.engine` takes them: a sequence of packed rows each, or one row each."""
    import torch

    from mindspeed_llm.models.packed import packed_rows

    lengths, made = job.row_lengths, []
    for pair in sequences(job):
        tokens, labels = (torch.from_numpy(one)[None].to(place) for one in pair)
        if packed:
            rows = packed_rows(lengths, lengths, place)
            padding = torch.zeros(tokens.shape, dtype=torch.bool, device=place)
            made.append({"tokens": tokens, "labels": labels, "packed": rows, "padding": padding})
        else:
            parts = zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)
            made += [{"tokens": row, "labels": wanted} for row, wanted in parts]
    return made


def our_engine(job: Job, device: Any, form: str, per_token: bool, seed: int = 1) -> Any:
    """A model with random weights made where they stay, adapted and wrapped for training.

    On a device other than the CPU, values come from that device's generator: to compare devices, fill them in.
    """
    import torch

    from mindspeed_llm.arguments.optimizer import OptimizerOptions
    from mindspeed_llm.checkpoint.metadata import LoraSettings
    from mindspeed_llm.lora.inject import inject
    from mindspeed_llm.models.config import ModelConfig
    from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
    from mindspeed_llm.training.engine import create_engine

    model = ModelConfig.from_hf_dict(hf_config(job).to_dict(), "benchmark")
    options = EngineOptions(dtype=DTYPES[job.dtype], calculate_per_token_loss=per_token, variable_seq_lengths=True)
    chunks = build_chunks(model, options, device)
    device.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    inject(chunks, LoraSettings(job.rank, float(job.alpha), tuple(TARGETS)), *FORMS[form][:1], 1, FORMS[form][1])
    return create_engine(chunks, OptimizerOptions(lr=1e-4, weight_decay=0.0))


def redraw(engine: Any, seed: int = 3) -> None:
    """The same values on every device: all parameters drawn on the host, norms around 1, B not zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(engine.chunks[0].named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if "norm" in name else 0.05)
            parameter.copy_(drawn + 1 if "norm" in name else drawn)


def gradients(engine: Any, made: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and every gradient of one global batch, on the host."""
    import torch

    from mindspeed_llm.training.engine import run_microbatches

    for chunk in engine.wrapped:
        chunk.zero_grad_buffer()
    told = run_microbatches(engine, made, forward_only=False)
    found = {"loss": torch.tensor(told.loss)}
    for name, parameter in engine.chunks[0].named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.main_grad.detach().float().cpu().clone()
    return found


def check(name: str, folder: str) -> None:
    """A worker: loss and gradients of the small model in every form, type and way of laying out rows, into a file."""
    requests, answer = channel()
    from mindspeed_llm import device

    chosen = device.select(name)
    import torch

    from mindspeed_llm.models import parallel

    parallel.start(chosen)
    answer(READY)
    for _ in requests:
        outcome = {}
        for dtype in ("float32", "bfloat16"):
            job = Job(**{**SMALL.__dict__, "dtype": dtype})
            for form in FORMS:
                engine = our_engine(job, chosen, form, per_token=True)
                redraw(engine)
                for how in ("separate", "packed"):
                    made = batches(job, chosen.torch_device(0), how == "packed")
                    outcome[f"{form} {dtype} {how}"] = gradients(engine, made)
        file = Path(folder) / f"check_{name}.pt"
        torch.save(outcome, file)
        answer({"file": str(file)})
    parallel.disconnect()


def our_step(job: Job, device: Any) -> tuple[Step, dict[str, Any]]:
    """Our training step over packed rows, and what it executes."""
    from mindspeed_llm.checkpoint.metadata import LoraSettings
    from mindspeed_llm.models import parallel
    from mindspeed_llm.models.config import ModelConfig
    from mindspeed_llm.training.engine import train_step
    from mindspeed_llm.training.flops import StepFlops

    parallel.start(device)
    engine = our_engine(job, device, "fused MLP", per_token=True)
    made = batches(job, device.torch_device(0), packed=True)
    model = ModelConfig.from_hf_dict(hf_config(job).to_dict(), "benchmark")
    flops = StepFlops(model, LoraSettings(job.rank, float(job.alpha), tuple(TARGETS)))
    trained = sum(int((batch["labels"] != -100).sum()) for batch in made)
    executed = flops.step(job.row_lengths * job.sequences, trained).total
    place = f"{device.name} with {device.capacity() / 2**30:.0f} GiB; {machine()}"
    return lambda: train_step(engine, made).loss, {"flops": executed, "machine": place}


def peer_step(job: Job, device: Any, attention: str) -> tuple[Step, dict[str, Any]]:
    """The same step in transformers + peft: positions that start anew make its attention mask between rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    place = device.torch_device(0)
    device.set_current(0)
    with torch.device(place):
        base = AutoModelForCausalLM.from_config(
            hf_config(job), dtype=getattr(torch, job.dtype), attn_implementation=attention
        )
    config = LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(place)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    positions = torch.cat([torch.arange(length) for length in job.row_lengths])[None].to(place)
    made = []
    for tokens, labels in sequences(job):
        shifted = torch.from_numpy(labels)[None].to(place)
        made.append({"input_ids": torch.from_numpy(tokens)[None].to(place), "shift_labels": shifted})
    count = sum(int((one["shift_labels"] != -100).sum()) for one in made)
    model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for one in made:
            out = model(**one, labels=one["shift_labels"], position_ids=positions, use_cache=False,
                        num_items_in_batch=count)  # fmt: skip
            out.loss.backward()
            total += out.loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(total)

    return step, {}


def speed(name: str, sizes: str, side: str) -> None:
    """A worker: answer every request with one step's seconds, loss and peak memory."""
    requests, answer = channel()
    from mindspeed_llm import device

    job, chosen = Job(**json.loads(sizes)), device.select(name)
    step, said = our_step(job, chosen) if side == "ours" else peer_step(job, chosen, PEERS[side])
    step()
    chosen.synchronize()
    answer(READY | said)
    for _ in requests:
        began = time.perf_counter()
        loss = step()
        chosen.synchronize()
        seconds = time.perf_counter() - began
        peak = chosen.memory()[1] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"seconds": seconds, "loss": loss, "peak": peak})
