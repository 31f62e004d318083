"""Make the tiny model and the rows of the quickstart: `python -m mindspeed_llm.quickstart.make --help`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from mindspeed_llm.checkpoint.atomic import StagedDirectory, sync_path, write_text
from mindspeed_llm.cli import run
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import InputError
from mindspeed_llm.quickstart.model import TinySize, write_model
from mindspeed_llm.quickstart.names import check_name, random_name
from mindspeed_llm.quickstart.rows import (
    Row,
    answer_rows,
    base_rows,
    identity_rows,
    in_batches,
    quiz_rows,
    uncovered,
)
from mindspeed_llm.quickstart.texts import everything, identity, pairs
from mindspeed_llm.quickstart.tokenizer import END_OF_TEXT, END_OF_TURN, train_tokenizer, write_tokenizer

BATCH = 32  # rows of a training step
QUIZ_REPEATS = 6  # times each quiz question is seen while the other base rows are seen once


def make_model(folder: Path, seed: int) -> tuple[int, int]:
    """Write an untrained tiny Qwen3 with its tokenizer; -> (parameters, vocabulary).

    The folder appears complete or not at all; an existing one is replaced. The same seed gives the same bytes.
    """
    size = TinySize()
    tokenizer = train_tokenizer(everything())
    vocabulary = tokenizer.get_vocab_size()
    staged = StagedDirectory(folder)
    place = staged.create()
    write_tokenizer(place, tokenizer, size.positions)
    ends = [tokenizer.token_to_id(token) for token in (END_OF_TURN, END_OF_TEXT)]
    parameters = write_model(place, size, vocabulary, *ends, seed)
    for file in place.iterdir():
        sync_path(file)
    staged.publish()
    return parameters, vocabulary


def make_base_rows(folder: Path, tokenizer: Tokenizer, seed: int) -> dict[str, int]:
    """Write `base.jsonl` (chat) and `quiz.jsonl` (plain text); -> rows by file."""
    chat = base_rows(tokenizer.encode, tokenizer.decode, tokenizer.vocab_size, seed)
    chat = in_batches(chat, tokenizer.encode, BATCH, seed)
    return {
        "base.jsonl": write_rows(folder / "base.jsonl", chat),
        "quiz.jsonl": write_rows(folder / "quiz.jsonl", quiz_rows(QUIZ_REPEATS, seed)),
    }


def make_identity_rows(folder: Path, tokenizer: Tokenizer, name: str, seed: int) -> dict[str, int]:
    """Write `identity.jsonl` (the name mixed with replayed answers) and `quiz_replay.jsonl`; -> rows by file.

    Raises:
        InputError: the base rows lie elsewhere, lack a token of the name, or hold the name already.
    """
    base = read_rows(folder / "base.jsonl")
    if missing := uncovered(name, base, tokenizer.encode):
        raise InputError(
            f"{folder / 'base.jsonl'} holds no answer with {len(missing)} tokens of the name {name!r}; LoRA cannot "
            "teach them, choose another QUICKSTART_NAME"
        )
    if known := next((entry["output"] for entry in base if name in entry["output"]), None):
        raise InputError(f"the base already answers with the name {name!r} ({known!r}); choose another QUICKSTART_NAME")
    mixed = in_batches(identity_rows(name, answer_rows()), tokenizer.encode, BATCH, seed)
    return {
        "identity.jsonl": write_rows(folder / "identity.jsonl", mixed),
        "quiz_replay.jsonl": write_rows(folder / "quiz_replay.jsonl", quiz_rows(1, seed)),
    }


def make_prompts(folder: Path) -> dict[str, int]:
    """Write `prompts.jsonl`, every question the gates ask, with what kind it is; -> rows by file."""
    asked: list[Row] = [{"kind": "answer", "prompt": pair.questions[0], "expected": pair.answer} for pair in pairs()]
    for split in ("train", "held_out"):
        asked += [
            {"kind": f"identity_{split}", "prompt": entry.question, "expected": entry.unnamed, "named": entry.named}
            for entry in identity(split)
        ]
    return {"prompts.jsonl": write_rows(folder / "prompts.jsonl", asked)}


def write_rows(file: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines, atomically; -> their number."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(lines))
    return len(lines)


def read_rows(file: Path) -> list[Row]:
    """Rows of a JSON-lines file.

    Raises:
        InputError: there is no such file, or it is not JSON lines.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); run the step before again") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(prog="python -m mindspeed_llm.quickstart.make", description=__doc__)
    words.add_argument("what", choices=("model", "base", "identity", "prompts", "name"))
    words.add_argument("--folder", type=Path, help="where the files go")
    words.add_argument("--tokenizer", type=Path, help="the tiny model's folder (base and identity)")
    words.add_argument("--seed", type=int, default=1, help="of the weights, the made-up words and the name")
    words.add_argument("--name", default="", help="the new name; left out, one is made up from the seed")
    return words


def main(argv: Sequence[str]) -> int:
    """Make one thing and say in one line what it is; -> exit status."""
    options = parser().parse_args(argv)
    name = check_name(options.name) if options.name else random_name(options.seed)
    if options.what == "name":
        print(name)
        return 0
    if options.what == "model":
        parameters, vocabulary = make_model(options.folder, options.seed)
        print(f"{parameters / 1e6:.2f} M parameters, {vocabulary} tokens: {options.folder}")
        return 0
    if options.what == "prompts":
        made = make_prompts(options.folder)
    elif options.what == "base":
        made = make_base_rows(options.folder, load_tokenizer(options.tokenizer), options.seed)
    else:
        made = make_identity_rows(options.folder, load_tokenizer(options.tokenizer), name, options.seed)
    print(", ".join(f"{count} rows in {file}" for file, count in made.items()))
    return 0


if __name__ == "__main__":
    run(main)
