"""Attention in chunks of the batch gives the modular form's loss and gradients, and sends while it computes."""

from dataclasses import replace

import numpy
import pytest

from mindspeed_llm.models.config import ModelConfig
from tests.distributed.compare import assert_close
from tests.distributed.pool import pool
from tests.lora.attention_worker import Form

pytestmark = pytest.mark.distributed
MODEL = ModelConfig.from_hf_dict(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "test",
)
FORMS = [Form(split, recompute=recompute) for split in (False, True) for recompute in (False, True)]


def run(form: Form) -> list:
    return pool(2).run("tests.lora.attention_worker:gradients", form=form, model=MODEL)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loss_and_gradients_equal_the_modular_forms(form: Form) -> None:
    for chunked, modular in zip(run(form), run(replace(form, fused=False)), strict=True):
        assert chunked.whole == [True, True]
        assert chunked.loss == pytest.approx(modular.loss, rel=1e-6)
        assert set(chunked.gradients) == set(modular.gradients)
        for name, value in modular.gradients.items():
            assert numpy.abs(value).max() > 0
            assert_close(chunked.gradients[name], value, name)


@pytest.mark.parametrize("split", [False, True])
def test_every_chunk_is_sent_before_the_one_before_it_is_waited_for(split: bool) -> None:
    for seen in run(Form(split)):
        assert seen.events.count("issue") == seen.events.count("wait") == 2 * 3 * (4 if split else 2)
        in_flight = [
            seen.events[:end].count("issue") - seen.events[:end].count("wait") for end in range(len(seen.events))
        ]
        assert max(in_flight) >= 3


@pytest.mark.parametrize("split", [False, True])
def test_bytes_are_those_of_the_separate_layers(split: bool) -> None:
    tokens, hidden, rank, size = 30, 24, 3, 4
    forward, second, first = hidden + rank, hidden + rank, rank  # below the first adapter no gradient is asked for
    sums = tokens * size * (2 * forward + second + first)
    gathers = tokens * size * (2 * hidden + 2 * hidden)
    expected = {"reduce_scatter": sums, "all_gather": gathers} if split else {"all_reduce": sums}
    assert [seen.sent for seen in run(Form(split))] == [expected] * 2


def test_sums_of_another_chunk_are_noticed() -> None:
    modular, wrong = run(Form(True, fused=False))[0], run(Form(True, fault="swapped"))[0]
    worst = max(
        numpy.abs(wrong.gradients[name] - value).max() / numpy.abs(value).max()
        for name, value in modular.gradients.items()
    )
    assert worst > 1e-3


@pytest.mark.parametrize("form", [Form(chunks=False), Form(sequences=1), Form(dropout=0.1)], ids=str)
def test_small_tensors_single_sequences_and_dropout_stay_whole(form: Form) -> None:
    assert all(not seen.events for seen in run(form))


@pytest.mark.parametrize("split", [False, True])
def test_bf16_gradients_are_as_close_to_fp32_as_the_modular_forms(split: bool) -> None:
    exact = run(Form(split, fused=False))[0].gradients

    def error(form: Form) -> float:
        found = run(form)[0].gradients
        return max(float(numpy.abs(found[n] - v).max() / numpy.abs(v).max()) for n, v in exact.items())

    assert error(Form(split, dtype="bfloat16")) <= 1.5 * error(Form(split, fused=False, dtype="bfloat16"))


def test_parameters_gathered_during_the_forward_pass_are_there_in_time() -> None:
    def ranks(form: Form) -> list:
        return pool(4).run("tests.lora.attention_worker:trained", form=form, model=MODEL, steps=3)

    modular, chunked = ranks(Form(True, fused=False))[0], ranks(Form(True))[0]
    assert (modular.calls, chunked.calls, chunked.late) == (0, 6, 0)
    for name, value in chunked.adapters.items():
        assert_close(value, modular.adapters[name], name)
    assert ranks(Form(True, fault="unhooked"))[0].late > 0
