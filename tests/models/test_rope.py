"""Rotary frequencies and their application, held against transformers. In pool processes: they import megatron-core."""

from typing import Any

import numpy
import pytest
import torch

from tests.distributed.pool import pool

SIZE, POSITIONS, BASE = 12, 64, 700.0
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    },
    "llama3 other bands": {
        "factor": 5.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0, "original_max_position_embeddings": 40
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn untruncated": {
        "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False, "beta_fast": 5.0, "beta_slow": 0.7
    },
    "yarn one component": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 1.0, "beta_slow": 1.0},
    "yarn deepseek": {
        "factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7
    },
    "yarn given": {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.8, 2.0], "long_factor": [1.0, 1.5, 2.5, 4.0, 9.0, 20.0],
        "original_max_position_embeddings": 16,
    },
    "longrope given": {
        "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [10, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_attention_factor_are_transformers(name: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.partition(" ")[0]
    scaling = {"rope_type": kind, **SCALINGS[name]}
    config = LlamaConfig(
        hidden_size=2 * SIZE, num_attention_heads=2, max_position_embeddings=POSITIONS,
        rope_parameters={**scaling, "rope_theta": BASE},
    )  # fmt: skip
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    given = {"base": BASE, "size": SIZE, "scaling": scaling, "length": length, "positions": POSITIONS}
    found, factor = pool(1).run("tests.models.rope_worker:frequencies", **given)[0]
    assert numpy.allclose(found, wanted.numpy(), rtol=2e-7, atol=0)
    assert factor == pytest.approx(wanted_factor, rel=1e-12)


@pytest.mark.parametrize(("size", "interleaved"), [(12, False), (8, False), (8, True)])
def test_a_rotated_pair_is_a_complex_product_and_the_rest_of_a_head_stays(size: int, interleaved: bool) -> None:
    x = torch.randn(5, 2, 3, 12, generator=torch.Generator().manual_seed(0)).numpy()
    angles = numpy.random.default_rng(0).standard_normal((5, size // 2)).astype(numpy.float32)
    found = pool(1).run("tests.models.rope_worker:rotated", x=x, angles=angles, interleaved=interleaved)[0]
    first, second = (x[..., :size:2], x[..., 1:size:2]) if interleaved else numpy.split(x[..., :size], 2, -1)
    turned = (first + 1j * second) * numpy.exp(1j * angles)[:, None, None]
    parts = (found[..., :size:2], found[..., 1:size:2]) if interleaved else numpy.split(found[..., :size], 2, -1)
    assert numpy.abs(parts[0] - turned.real).max() < 1e-6 and numpy.abs(parts[1] - turned.imag).max() < 1e-6
    assert numpy.array_equal(found[..., size:], x[..., size:])


def test_a_table_is_made_anew_only_when_its_frequencies_or_its_length_do_not_serve() -> None:
    scaling = {"rope_type": "longrope", **SCALINGS["longrope"]}
    made = pool(1).run("tests.models.rope_worker:tables_made", scaling=scaling, lengths=[10, 12, 15, 16, 17, 20, 40, 9])
    assert made == [[10, 16, 17, 40, 9]]
