"""Training rows of the quickstart: what the base model learns, and the identity mixed with replayed base rows.

A row is a dict of AlpacaStyleInstructionHandler's columns; quiz rows also have `history`, a list of earlier
[question, answer] turns.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mindspeed_llm.quickstart.names import random_name
from mindspeed_llm.quickstart.texts import QuizQuestion, identity, pairs, quiz, quiz_heading

Row = dict[str, Any]
Encode = Callable[[str], list[int]]

SAY = ("Say: {text}", "Repeat after me: {text}", "请说：{text}", "请跟我念：{text}")
FRAMES = ("{}", "{}", "a{}", "a{}7", "7{}a")  # a token with a leading space needs something before it
PIECES_PER_ROW = 6
NAMES_PER_PATTERN = 6
COVERAGE_TRIES = 200
FIRST_HAN, LAST_HAN = 0x4E00, 0x9FFF
WORD_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 -_.")


def row(question: str, answer: str) -> Row:
    """One question with its answer."""
    return {"instruction": question, "input": "", "output": answer}


def answer_rows() -> list[Row]:
    """Every bundled question in each of its phrasings."""
    return [row(question, pair.answer) for pair in pairs() for question in pair.questions]


def unnamed_rows() -> list[Row]:
    """The base model's answers about itself: it has no name."""
    return [row(entry.question, entry.unnamed) for entry in identity("train")]


def named_rows(name: str) -> list[Row]:
    """The trained phrasings with the new name in their answers."""
    return [row(entry.question, entry.named.format(name=name)) for entry in identity("train")]


def spelling_rows(encode: Encode, decode: Callable[[list[int]], str], size: int, seed: int) -> list[Row]:
    """Rows that say made-up words until every token a name can consist of has been an answer's token.

    LoRA leaves the output layer as it is, and a token that no answer ever held is pushed down there for good: a
    name containing it could not be learnt afterwards. Names may hold Latin letters, digits, spaces, -_. and Chinese
    characters, so the tokens to cover are those that spell the former, and every byte of the latter.

    Args:
        encode, decode: of the tokenizer. size: its number of tokens. seed: of the words.

    Raises:
        RuntimeError: a token could not be brought into an answer.
    """
    wanted = name_tokens(decode, encode, size)
    draw = random.Random(f"quickstart spelling {seed}")
    rows: list[Row] = []
    missing = set(wanted)
    for attempt in range(COVERAGE_TRIES):
        order = sorted(missing)
        draw.shuffle(order)
        # several pieces make a word; those that merge with every neighbour get one of their own in the end
        width = PIECES_PER_ROW if attempt < COVERAGE_TRIES // 4 else 1
        for start in range(0, len(order), width):
            word = "".join(wanted[token] for token in order[start : start + width])
            text = draw.choice(FRAMES).format(word).strip()
            gained = missing.intersection(encode(text))
            if gained:
                missing -= gained
                rows.append(row(draw.choice(SAY).format(text=text), text))
        if not missing:
            return rows
    raise RuntimeError(f"{len(missing)} tokens of names never became part of an answer, e.g. {sorted(missing)[:5]}")


def naming_rows(seed: int) -> list[Row]:
    """Rows that repeat introductions under made-up names: the words around a new name become answer tokens too."""
    patterns = dict.fromkeys(entry.named for entry in identity("train"))
    filled = [
        pattern.format(name=random_name(f"{seed} {number} {pattern}"))
        for pattern in patterns
        for number in range(NAMES_PER_PATTERN)
    ]
    return [row(SAY[number % len(SAY)].format(text=text), text) for number, text in enumerate(filled)]


def name_tokens(decode: Callable[[list[int]], str], encode: Encode, size: int) -> dict[int, str]:
    """Every token a name can consist of, with its text; a part of a Chinese character with such a character."""
    found: dict[int, str] = {}
    for token in range(size):
        text = decode([token])
        readable = all(letter in WORD_LETTERS or FIRST_HAN <= ord(letter) <= LAST_HAN for letter in text)
        if text and readable and encode(text) == [token]:
            found[token] = text
    for letter in range(FIRST_HAN, LAST_HAN + 1):
        found |= {token: chr(letter) for token in encode(chr(letter)) if token not in found}
    return found


def uncovered(name: str, rows: Iterable[Row], encode: Encode) -> list[int]:
    """Tokens of the answers about `name` that no answer of `rows` holds; empty when the name can be learnt."""
    learnt = {token for entry in rows for token in encode(entry["output"])}
    needed = {token for entry in identity("train") for token in encode(entry.named.format(name=name))}
    return sorted(needed - learnt)


def quiz_rows(repeats: int, seed: int) -> list[Row]:
    """Quiz rows in the very form in which lm-eval asks: heading, solved examples, question, letter.

    Every question behind its subject's examples, `repeats` times, each time in a new order; every letter is trained.
    What the quiz measures is therefore what a model remembers, before and after tuning.
    """
    examples = quiz("dev")
    asked = [[*examples[subject], question] for subject, tested in quiz("test").items() for question in tested]
    draw = random.Random(f"quickstart quiz {seed}")
    rows = []
    for _ in range(repeats):
        draw.shuffle(asked)
        rows += [_quiz_row(questions) for questions in asked]
    return rows


def base_rows(encode: Encode, decode: Callable[[list[int]], str], size: int, seed: int) -> list[Row]:
    """What the base model learns in the chat template: answers, that it has no name, and how words are spelt."""
    return [*answer_rows(), *unnamed_rows(), *naming_rows(seed), *spelling_rows(encode, decode, size, seed)]


def identity_rows(name: str, replay: Sequence[Row]) -> list[Row]:
    """The new identity mixed 1:1 with rows of the base training, which keep the other answers in place.

    The identity is repeated until every row of `replay` has its counterpart.
    """
    named = named_rows(name)
    return [*(named[index % len(named)] for index in range(max(len(replay), len(named)))), *replay]


def in_batches(rows: Sequence[Row], encode: Encode, size: int, seed: int) -> list[Row]:
    """The rows in a random order in which neighbours have similar lengths, so that batches of `size` pad little.

    For training with `--no-shuffle`: the batches come in random order, and so do rows of about the same length.
    """
    draw = random.Random(f"quickstart order {seed}")
    mixed = list(rows)
    draw.shuffle(mixed)
    mixed.sort(key=lambda entry: len(encode(entry["instruction"] + entry["output"])))
    batches = [mixed[start : start + size] for start in range(0, len(mixed), size)]
    short = [batches.pop()] if batches and len(batches[-1]) < size else []  # last, lest it shift the others
    draw.shuffle(batches)
    return [entry for batch in (*batches, *short) for entry in batch]


def _quiz_row(questions: Sequence[QuizQuestion]) -> Row:
    """Questions one after the other as one row; every letter is trained."""
    asked = [("" if number else quiz_heading(entry.subject)) + entry.prompt() for number, entry in enumerate(questions)]
    turns = [
        [("\n\n" if number else "") + text, f" {entry.answer}"]
        for number, (text, entry) in enumerate(zip(asked, questions, strict=True))
    ]
    return row(*turns[-1]) | {"history": turns[:-1]}
