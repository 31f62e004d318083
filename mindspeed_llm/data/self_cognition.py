"""The built-in source `self-cognition`: questions about the assistant's name and maker, in Chinese and English.

Training on them with `--model-name` and `--model-author` gives a model a name of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mindspeed_llm.data.rows import Row
from mindspeed_llm.errors import UsageError

QUESTIONS = Path(__file__).with_name("self_cognition.json")
NAMES = ("self-cognition", "self_cognition")
FORM = "self-cognition"
HANDLER = "AlpacaStyleInstructionHandler"
MAP_KEYS = '{"prompt": "question", "query": "", "response": "answer"}'


def is_self_cognition(path: str) -> bool:
    """Whether a source's path names the built-in questions, also under another publisher's name."""
    return path.rsplit("/", 1)[-1].lower() in NAMES


def self_cognition_rows(names: Sequence[str], authors: Sequence[str]) -> list[Row]:
    """The rows with the names filled in, the two languages in turn.

    Args:
        names, authors: one value for both languages, or two: Chinese, English.

    Raises:
        UsageError: a name or an author is missing, or there are more than two.
    """
    for flag, values in (("--model-name", names), ("--model-author", authors)):
        if len(values) not in (1, 2) or not all(value.strip() for value in values):
            given = " ".join(map(repr, values)) or "nothing"
            raise UsageError(
                f"{flag}: {given} is given; the source self-cognition needs one value, or two (Chinese, English)"
            )
    content = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    rows = []
    for number, pair in enumerate(zip(content["zh"], content["en"], strict=True)):
        for language, entry in enumerate(pair):
            fill = {"name": names[min(language, len(names) - 1)], "author": authors[min(language, len(authors) - 1)]}
            columns = {column: text.format(**fill) for column, text in entry.items()}
            rows.append(Row(FORM, 2 * number + language + 1, columns, form=FORM))
    return rows
