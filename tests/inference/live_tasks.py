"""What the test processes run: our live model, opened by the program's own options, asked for numbers."""

from collections.abc import Sequence
from typing import Any


def opened(argv: Sequence[str]) -> tuple[Any, Any, Any]:
    """(options, prompter, live model) of an inference.py command line."""
    from mindspeed_llm import device
    from mindspeed_llm.arguments.parser import parse
    from mindspeed_llm.arguments.programs import InferenceOptions
    from mindspeed_llm.inference.live import load_model, open_sources
    from mindspeed_llm.inference.prompts import Prompter

    options = parse(InferenceOptions, list(argv), "inference.py")
    sources = open_sources(options)
    prompter = Prompter(options, sources)
    return options, prompter, load_model(options, sources, device.select("cpu"))


def answers(rank: int, argv: Sequence[str], prompts: Sequence[list[int]], jobs: Sequence[dict[str, Any]]) -> list[Any]:
    """Ids generated for each prompt under each job: {"stops", "tokens", and for beams "beams", "penalty"; "cache"}."""
    from mindspeed_llm.inference.generate import Limits, beam_search, generate
    from mindspeed_llm.inference.sampling import greedy
    from mindspeed_llm.models import parallel

    _, _, model = opened(argv)
    try:
        results = []
        for job in jobs:
            limits = Limits(job["tokens"], 256, frozenset(job["stops"]))
            cache = job.get("cache", True)
            if job.get("beams"):
                found = [
                    beam_search(model, p, limits, job["beams"], job.get("penalty", 1.0), use_cache=cache)
                    for p in prompts
                ]
            elif job.get("batch"):
                found = generate(model, prompts, limits, greedy, cache)
            else:
                found = [generate(model, [p], limits, greedy, cache)[0] for p in prompts]
            results.append(found)
        return results
    finally:
        parallel.stop()


def logits(rank: int, argv: Sequence[str], prompts: Sequence[list[int]]) -> list[Any]:
    """Logits [v] behind every prompt, as numpy."""
    import torch

    from mindspeed_llm.models import parallel

    _, _, model = opened(argv)
    try:
        return [model.next_logits(torch.tensor([prompt]), None)[0].numpy() for prompt in prompts]
    finally:
        parallel.stop()


def prompt_ids(rank: int, argv: Sequence[str], question: str) -> list[int]:
    """The prompt of one question; no model is built."""
    from mindspeed_llm.arguments.parser import parse
    from mindspeed_llm.arguments.programs import InferenceOptions
    from mindspeed_llm.inference.live import open_sources
    from mindspeed_llm.inference.prompts import Prompter

    options = parse(InferenceOptions, list(argv), "inference.py")
    return Prompter(options, open_sources(options)).encode([{"role": "user", "content": question}])
