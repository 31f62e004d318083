"""The command line of preprocessing that tests vary: Alpaca rows under the template qwen3."""

from pathlib import Path
from typing import Any

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.preprocess import preprocess


def words(source: Path, prefix: Path, tokenizer: Path, *more: str) -> list[str]:
    """The words after `preprocess_data.py`; a flag in `more` replaces the one given here."""
    return [
        "--input", str(source), "--output-prefix", str(prefix), "--tokenizer-name-or-path", str(tokenizer),
        "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3", *more,
    ]  # fmt: skip


def run(source: Path, prefix: Path, tokenizer: Path, *more: str) -> dict[str, Any]:
    """Preprocess in this process; returns the report."""
    return run_words(words(source, prefix, tokenizer, *more))


def run_words(given: list[str]) -> dict[str, Any]:
    """Preprocess as a command line says; returns the report."""
    return preprocess(parse(PreprocessOptions, given, "preprocess_data.py"))
