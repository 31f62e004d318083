"""Rows packed into one sequence, in every family: what the network says to each is what transformers says to it alone.

That covers every kind of rotary frequencies (those that depend on a row's length among them), windows, caps, sinks and
latent attention.
"""

from collections.abc import Sequence

import numpy
import pytest
import torch

from tests.distributed.pool import pool
from tests.models import parity, tiny_moe
from tests.models.families import DENSE

EVERY = {str(tiny): tiny for tiny in (*DENSE, *tiny_moe.EVERY)}
LENGTHS = (9, 23, 1, 6)  # the longest is beyond the original length of the models whose frequencies depend on it
JOINED = (32, 1, 6)  # the first two as one


def tokens() -> numpy.ndarray:
    """All rows in one, [1, tokens]."""
    return numpy.random.default_rng(4).integers(3, parity.VOCABULARY, (1, sum(LENGTHS)))


def alone(name: str) -> numpy.ndarray:
    """transformers' logits of each row on its own, joined: [tokens, vocabulary]."""
    tiny = EVERY[name]
    model = parity.model_of(tiny) if isinstance(tiny, parity.Tiny) else tiny_moe.build(tiny)
    with torch.no_grad():
        rows = torch.from_numpy(tokens()).split(LENGTHS, 1)
        return torch.cat([model(row, use_cache=False).logits[0] for row in rows]).numpy()


def packed(name: str, lengths: Sequence[int] = LENGTHS, counted: Sequence[int] = LENGTHS) -> numpy.ndarray:
    """Our logits of the one sequence, [tokens, vocabulary], with attention within `lengths`, positions in `counted`."""
    tiny = EVERY[name]
    folder = parity.folder(tiny) if isinstance(tiny, parity.Tiny) else tiny_moe.saved(tiny)
    given = {"folder": folder, "tokens": tokens(), "lengths": lengths, "counted": counted}
    return pool(1).run("tests.models.parity_worker:packed_logits", **given)[0]


@pytest.mark.parametrize("name", EVERY)
def test_each_packed_row_gets_the_logits_transformers_gives_it_alone(name: str) -> None:
    parity.assert_equal(packed(name), alone(name))


@pytest.mark.parametrize("name", ["glm4", "gemma3", "llama dynamic beyond", "phi3 longrope beyond", "deepseek-v3"])
def test_attention_across_one_bound_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        parity.assert_equal(packed(name, lengths=JOINED), alone(name))


@pytest.mark.parametrize("name", ["llama dynamic beyond", "phi3 longrope beyond"])
def test_positions_counted_on_behind_a_bound_are_noticed_where_frequencies_depend_on_the_length(name: str) -> None:
    with pytest.raises(AssertionError):
        parity.assert_equal(packed(name, counted=JOINED), alone(name))


@pytest.mark.parametrize("name", ["glm4", "deepseek-v3"])
def test_positions_counted_anew_one_token_late_are_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        parity.assert_equal(packed(name, counted=(10, 22, 1, 6)), alone(name))
