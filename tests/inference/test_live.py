"""Our live model against transformers on the same folder: logits, greedy tokens, beams, at every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_llm.data.tokenizer import load_tokenizer
from tests.distributed.pool import pool
from tests.fixtures import exported, hf_model, mcore_model, sentence, tuned
from tests.inference import live_tasks

LAYOUTS = {
    "TP1": (1, 1, 1),
    "TP2": (2, 2, 1),
    "PP2": (2, 1, 2),
    "TP2 PP2": (4, 2, 2),
}
TOKENS = 12


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(str(hf_model()))
    return [tokenizer.encode(sentence(seed, 2 + seed)) for seed in range(8)]


def command(adapter: bool, tensor: int = 1, pipeline: int = 1, base: Path | None = None) -> list[str]:
    words: list[Any] = ["--load", base or hf_model(), "--tensor-model-parallel-size", tensor]
    words += ["--pipeline-model-parallel-size", pipeline, "--tokenizer-name-or-path", hf_model()]
    return [str(word) for word in [*words, *(["--lora-load", tuned()] if adapter else [])]]


def reference(adapter: bool) -> Any:
    """transformers' model of the same weights."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(exported() if adapter else hf_model()).float().eval()


@torch.no_grad()
def transformers_answers(model: Any, stops: list[int], **more: Any) -> list[list[int]]:
    found = []
    for prompt in prompts():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, eos_token_id=stops or None, pad_token_id=0, **more,
            **({} if stops else {"min_new_tokens": more["max_new_tokens"]}),
        )[0, len(prompt) :].tolist()  # fmt: skip
        end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
        found.append(ids[:end])
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["base", "base and adapter"])
def adapter(request: pytest.FixtureRequest) -> bool:
    return request.param


def common_tokens(model: Any) -> list[int]:
    """Tokens the model likes to generate, which end answers early when they are made stop tokens."""
    free = [token for answer in transformers_answers(model, [], max_new_tokens=TOKENS) for token in answer[3:]]
    return [int(token) for token, _ in sorted(((t, free.count(t)) for t in set(free)), key=lambda x: -x[1])[:3]]


def jobs(stops: list[int]) -> list[dict[str, Any]]:
    one = {"stops": stops, "tokens": TOKENS}
    return [
        {"stops": [], "tokens": TOKENS},
        one,
        {**one, "cache": False},
        {**one, "beams": 2},
        {**one, "beams": 2, "cache": False},
        {**one, "beams": 3, "penalty": 0.0},
        {**one, "beams": 4, "penalty": 2.0, "stops": stops[:1]},
    ]


@pytest.fixture(scope="module")
def wanted(adapter: bool) -> tuple[list[int], list[Any]]:
    """Stop tokens, and transformers' answers to `jobs`."""
    model = reference(adapter)
    stops = common_tokens(model)
    found = []
    for job in jobs(stops):
        beams = {"num_beams": job["beams"], "length_penalty": job.get("penalty", 1.0)} if "beams" in job else {}
        found.append(transformers_answers(model, job["stops"], max_new_tokens=TOKENS, **beams))
    return stops, found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_and_beams_are_transformers_with_and_without_a_cache(
    layout: str, adapter: bool, wanted: tuple[list[int], list[Any]]
) -> None:
    size, tensor, pipeline = LAYOUTS[layout]
    stops, found = wanted
    assert any(len(answer) < TOKENS for answer in found[1]) and any(len(answer) > 1 for answer in found[1])
    asked = jobs(stops) if size == 1 else jobs(stops)[1:4]
    found = found if size == 1 else found[1:4]
    argv = command(adapter, tensor, pipeline)
    for rank, ours in enumerate(pool(size).run(live_tasks.answers, argv=argv, prompts=prompts(), jobs=asked)):
        for job, mine, theirs in zip(asked, ours, found, strict=True):
            assert mine == theirs, (rank, job)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_transformers_to_1e_5(layout: str, adapter: bool) -> None:
    size, tensor, pipeline = LAYOUTS[layout]
    model = reference(adapter)
    for ours in pool(size).run(live_tasks.logits, argv=command(adapter, tensor, pipeline), prompts=prompts()):
        for prompt, mine in zip(prompts(), ours, strict=True):
            with torch.no_grad():
                theirs = model(torch.tensor([prompt])).logits[0, -1].numpy()
            assert mine.shape == theirs.shape and np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_prompts_of_one_length_are_answered_together_as_alone(
    wanted: tuple[list[int], list[Any]], adapter: bool
) -> None:
    stops, _ = wanted
    short = [(prompt * 3)[:5] for prompt in prompts()]
    job = {"stops": stops, "tokens": TOKENS}
    alone, together, uncached = pool(1).run(
        live_tasks.answers,
        argv=command(adapter),
        prompts=short,
        jobs=[job, {**job, "batch": True}, {**job, "batch": True, "cache": False}],
    )[0]
    assert alone == together == uncached and len({len(answer) for answer in alone}) > 1


@pytest.mark.distributed
def test_a_base_from_a_megatron_checkpoint_of_another_layout_answers_the_same() -> None:
    job = [{"stops": [], "tokens": TOKENS}]
    first = pool(1).run(live_tasks.answers, argv=command(True), prompts=prompts(), jobs=job)[0]
    argv = command(True, 2, 1, mcore_model(1, 2))
    assert all(other == first for other in pool(2).run(live_tasks.answers, argv=argv, prompts=prompts(), jobs=job))


@pytest.mark.distributed
def test_bf16_answers_are_the_same_at_every_layout_up_to_near_ties() -> None:
    argv = [*command(True), "--bf16"]
    one = pool(1).run(live_tasks.logits, argv=argv, prompts=prompts())[0]
    two = pool(2).run(live_tasks.logits, argv=[*command(True, 2), "--bf16"], prompts=prompts())[0]
    full = pool(1).run(live_tasks.logits, argv=command(True), prompts=prompts())[0]
    for mine, cut, exact in zip(one, two, full, strict=True):
        assert (
            np.abs(mine - exact).max() < 0.05 * np.abs(exact).max()
            and np.abs(cut - exact).max() < 0.05 * np.abs(exact).max()
        )
        assert not np.array_equal(mine, exact), "bf16 was asked for and fp32 computed"
