"""Tiny transformers models and random PEFT adapters on them: the judges of what an adapter computes."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mindspeed_llm.checkpoint.formats.hf import copy_companions, write_hf
from mindspeed_llm.checkpoint.formats.lazy import TensorSource

TOKENS = torch.tensor([[3, 7, 11, 19, 2, 5, 30, 23], [1, 36, 9, 9, 14, 22, 8, 4]])
"""Within the tiny vocabulary of 37."""
TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")


def redraw(model: torch.nn.Module, seed: int, only: tuple[str, ...] = ()) -> None:
    """Draw every parameter and persistent buffer, or those with one of `only` in their names; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        if not state[name].is_floating_point() or (only and not any(part in name for part in only)):
            continue
        values = torch.randn(state[name].shape, generator=generator)
        norm = "norm" in name or "magnitude" in name
        state[name].copy_((values * (0.15 if "lora_" in name else 0.2) + norm).to(state[name].dtype))


def qwen3(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A Qwen3 folder: 3 layers, 6 heads of 10 in 2 groups, hidden 24, ffn 44, 37 rows of vocabulary."""
    config = Qwen3Config(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return saved(Qwen3ForCausalLM(config), folder, dtype)


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Redraw a model and save it."""
    redraw(model, 3)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, as it is stored."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **eager)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the fixed tokens, in float32."""
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits.float()


def adapt(
    base: Path,
    folder: Path,
    seed: int = 1,
    save: dict[str, Any] | None = None,
    train: tuple[str, ...] = TRAINED,
    **settings: Any,
) -> torch.Tensor:
    """Save a random adapter made by peft; returns the logits that peft gives with it.

    Args:
        save: further arguments of peft's save_pretrained.
        train: parts of the names of what is drawn anew.
        settings: of peft's LoraConfig.
    """
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=False)
    redraw(model, seed, train)
    model.save_pretrained(folder, **(save or {}))
    adapted = logits(PeftModel.from_pretrained(load(base), folder, autocast_adapter_dtype=False))
    assert (adapted - logits(load(base))).abs().max() > 0.05, "an adapter that changes nothing proves nothing"
    return adapted


def transformers_of(source: TensorSource, base: Path, folder: Path) -> PreTrainedModel:
    """transformers' model of the HF folder that a source is written to."""
    folder.mkdir()
    write_hf(source, folder)
    copy_companions(base, folder, source.config)
    return load(folder)


def same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within 1e-5 of the scale, which has to be one that shows differences."""
    scale = expected.std().item()
    assert scale >= 0.5, f"logits with a standard deviation of {scale} prove little"
    worst = (found - expected).abs().max().item()
    assert worst <= 1e-5 * max(1.0, scale), f"logits differ by {worst} at a scale of {scale}"
