"""Answers before and after tuning, side by side: `python -m mindspeed_llm.quickstart.show --help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_llm.cli import run
from mindspeed_llm.quickstart.make import read_rows

PER_KIND = 2  # questions shown of each kind: the first of the first and of the second half, English and Chinese


def chosen(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Numbers of the rows to show."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    numbers = []
    for kind in kinds:
        of_kind = [number for number, row in enumerate(rows) if row["kind"] == kind]
        chinese = [number for number in of_kind if not rows[number]["prompt"].isascii()]
        numbers += [*of_kind[:1], *chinese[:1]][:PER_KIND]
    return numbers


def main(argv: Sequence[str]) -> int:
    """Print the questions with their answers; -> exit status."""
    words = argparse.ArgumentParser(prog="python -m mindspeed_llm.quickstart.show", description=__doc__)
    words.add_argument("answers", type=Path, nargs="+", help="answers of one model after the other (jsonl)")
    options = words.parse_args(argv)
    files = [read_rows(file) for file in options.answers]
    width = max(len(file.stem) for file in options.answers)
    for number in chosen(files[0]):
        print(f"  {files[0][number]['prompt']}")
        for file, rows in zip(options.answers, files, strict=True):
            print(f"    {file.stem:<{width}}  {rows[number]['answer']}")
    return 0


if __name__ == "__main__":
    run(main)
