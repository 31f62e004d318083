"""Tiny models of every family, made by transformers with all values redrawn, and what our network says to the same.

`Tiny` says how to make one; `folder` makes it once per test run; `reference` is transformers' answer to `tokens`.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from tests.distributed.pool import pool

ROWS, LENGTH, VOCABULARY = 2, 23, 61


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        name: of the test.
        config: name of transformers' configuration class.
        options: its arguments, over `SIZES`.
        length: tokens of each row.
        edit: changes the saved folder into what the hub has, where transformers saves something else.
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    length: int = LENGTH
    edit: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """New values for all parameters and persistent buffers: norms around 1, everything else around 0.

    Larger values for the layers' matrices would prove no more: they let fp32 rounding alone pass the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.state_dict().items():
        if values.is_floating_point():
            spread = 0.18 if values.dim() > 1 and ".layers." in name else 0.3
            values.copy_(torch.randn(values.shape, generator=generator) * spread + ("norm" in name))
    model.tie_weights()


@functools.cache
def scratch() -> Path:
    """A folder that lasts as long as the test run."""
    holder = tempfile.TemporaryDirectory(prefix="tiny-")
    scratch.holder = holder
    return Path(holder.name)


@functools.cache
def model_of(tiny: Tiny) -> Any:
    """transformers' model, in fp32 and for evaluation."""
    import transformers

    options = {**SIZES, **tiny.options}
    config = getattr(transformers, tiny.config)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    redraw(model)
    return model.eval()


@functools.cache
def folder(tiny: Tiny) -> Path:
    """Its HF folder, as released on the hub."""
    path = scratch() / tiny.name.replace(" ", "_")
    model_of(tiny).save_pretrained(path)
    if tiny.edit:
        tiny.edit(path)
    return path


def tokens(tiny: Tiny) -> numpy.ndarray:
    """[rows, length] token ids."""
    return numpy.random.default_rng(1).integers(0, VOCABULARY, (ROWS, tiny.length))


def reference(tiny: Tiny) -> numpy.ndarray:
    """transformers' logits [rows, length, vocabulary]."""
    with torch.no_grad():
        return model_of(tiny)(torch.from_numpy(tokens(tiny)), use_cache=False).logits.numpy()


def ours(tiny: Tiny, task: str = "logits", world: int = 1, **arguments: Any) -> list[Any]:
    """What `tests.models.parity_worker:<task>` returns on each of `world` processes."""
    given = {"folder": folder(tiny), "tokens": tokens(tiny), **arguments}
    return pool(world).run(f"tests.models.parity_worker:{task}", **given)


def assert_equal(found: numpy.ndarray, wanted: numpy.ndarray) -> None:
    """Logits agree within 1e-5 of their scale, and say something."""
    scale = wanted.std()
    assert scale >= 0.5, "these logits are too small to prove anything"
    difference = numpy.abs(found - wanted).max()
    assert difference <= 1e-5 * max(1.0, scale), (difference, scale)


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a saved config.json; None removes one."""
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
