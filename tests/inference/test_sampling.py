"""Choosing tokens, against transformers' logits processors and plain counting."""

import pytest
import torch

from mindspeed_llm.inference.sampling import BeamSampling, greedy, question_seed, sampler, warp


def transformers_warp(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    for one in warpers:
        logits = one(ids, logits)
    return logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_logits_are_warped_as_transformers_warps_them(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 331, generator=torch.Generator().manual_seed(1)) * 3
    logits[1, 40:60] = logits[1].max()  # ties
    assert torch.equal(warp(logits, temperature, top_k, top_p), transformers_warp(logits, temperature, top_k, top_p))


def test_greedy_takes_the_likeliest() -> None:
    assert greedy(torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])).tolist() == [1, 0]


def test_draws_follow_the_warped_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]]).repeat(8000, 1)
    drawn = sampler(1.0, 4, 1.0, [question_seed(3, n) for n in range(8000)])(logits)
    shares = torch.bincount(drawn, minlength=5) / 8000
    wanted = torch.cat([logits[0, :4].softmax(0), torch.zeros(1)])
    assert (shares - wanted).abs().max() < 0.02


def test_what_is_drawn_for_a_question_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    seeds = [question_seed(1, n) for n in (4, 5, 6)]
    together = sampler(1.0, 0, 1.0, seeds)
    alone = [sampler(1.0, 0, 1.0, [seed]) for seed in seeds]
    for _ in range(4):
        assert together(logits).tolist() == [int(one(logits[n : n + 1])) for n, one in enumerate(alone)]
    assert len({question_seed(a, b) for a in range(20) for b in range(20)}) == 400


def test_beam_draws_are_without_replacement_in_proportion_to_probability_and_new_each_step() -> None:
    draws = BeamSampling(1.0, 0, 1.0, 5)
    total = torch.tensor([0.5, 0.3, 0.2]).log()
    firsts = [int(draws.rank(total).argmax()) for _ in range(6000)]
    shares = torch.bincount(torch.tensor(firsts), minlength=3) / 6000
    assert (shares - total.exp()).abs().max() < 0.03
