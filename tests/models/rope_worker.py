"""What the pool's processes run for the rope tests. Imports megatron-core."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy
import torch

from mindspeed_llm.device import rowwise
from mindspeed_llm.models import rope
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.tiny import hf_config


def frequencies(rank: int, **given: Any) -> tuple[numpy.ndarray, float]:
    """(inverse frequencies, attention factor)."""
    found, factor = rope.inverse_frequencies(**given)
    return found.numpy(), factor


def rotated(rank: int, x: numpy.ndarray, angles: numpy.ndarray, interleaved: bool) -> numpy.ndarray:
    """`x` [s, b, n, d] turned by `angles` [s, pairs]."""
    pairs = torch.from_numpy(angles)
    whole = pairs.repeat_interleave(2, 1) if interleaved else torch.cat([pairs, pairs], 1)
    return rowwise.rotate(torch.from_numpy(x), torch.stack([whole.cos(), whole.sin()], 1), interleaved).numpy()


def tables_made(rank: int, scaling: dict[str, Any], lengths: Sequence[int]) -> list[int]:
    """The lengths, asked for in this order, for which a table was made; each is checked against a fresh one."""
    raw = {**hf_config(), "head_dim": 12, "rope_scaling": scaling}
    model = ModelConfig.from_hf_dict(raw, "here")
    made = []
    rotary = rope.Rotary(model, torch.device("cpu"), None)
    for length in lengths:
        with mock.patch.object(rotary, "table", wraps=rotary.table) as table:
            found = rotary(length)
        made += [length] if table.called else []
        assert torch.equal(found, rope.Rotary(model, torch.device("cpu"), None).table(length, length))
    return made
