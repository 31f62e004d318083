"""What the test processes run for the evaluation tests."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


def log_likelihoods(rank: int, argv: Sequence[str], requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(log-likelihood, greedy) of every (context, continuation), by an evaluation.py command line."""
    from mindspeed_llm import device
    from mindspeed_llm.arguments.parser import parse
    from mindspeed_llm.arguments.programs import EvaluateOptions
    from mindspeed_llm.checkpoint.recorded import tokenizer_folder
    from mindspeed_llm.data.tokenizer import load_tokenizer
    from mindspeed_llm.evaluation.main import prepare_offline

    prepare_offline()
    from lm_eval.api.instance import Instance

    from mindspeed_llm.evaluation.harness import LiveLM
    from mindspeed_llm.inference.live import load_model, open_sources
    from mindspeed_llm.models import parallel

    options = parse(EvaluateOptions, list(argv), "evaluation.py")
    sources = open_sources(options)
    tokenizer = load_tokenizer(tokenizer_folder(options.tokenizer, sources.base))
    model = load_model(options, sources, device.select("cpu"))
    try:
        live = LiveLM(model, tokenizer, options.evaluation.evaluation_batch_size, options.seq_length or 256)
        instances = [Instance("loglikelihood", {}, tuple(pair), n) for n, pair in enumerate(requests)]
        return [(float(total), bool(greedy)) for total, greedy in live.loglikelihood(instances)]
    finally:
        parallel.stop()


@contextlib.contextmanager
def _broken() -> Iterator[None]:
    from mindspeed_llm.evaluation import main

    def score(*args: Any) -> None:
        raise RuntimeError("the scorer broke")

    kept, main.score = main.score, score
    try:
        yield
    finally:
        main.score = kept


def with_broken_scorer(rank: int, argv: Sequence[str], cwd: str) -> Any:
    """evaluation.py with a defect inside: it must not end well."""
    from tests.fixtures import run_on_rank

    return run_on_rank(rank, "evaluation.py", argv, cwd, around=_broken)
