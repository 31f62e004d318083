"""The rows of a run on their way to the tokenizer: judged by size, gathered into chunks of bounded memory."""

from collections.abc import Iterable, Iterator

from mindspeed_llm.data.readers import Fault
from mindspeed_llm.data.rows import Row, text_size

CHUNK_ROWS = 250  # rows tokenised in one batch; the output does not depend on it
CHUNK_CHARACTERS = 2_000_000  # a chunk ends early at this size, so that long rows do not pile up in memory
TOO_MUCH_TEXT = "more text than --max-chars-per-row allows"


def in_chunks(rows: Iterable[Row], max_characters: int) -> Iterator[list[Row]]:
    """Lists of rows to be tokenised together; rows that cannot be come with their `fault` and without columns.

    Args:
        max_characters: rows with more text than this get the fault `TOO_MUCH_TEXT`.
    """
    chunk: list[Row] = []
    size = 0
    for row in rows:
        judged, characters = _judged(row, max_characters)
        if chunk and size + characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(judged)
        size += characters
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _judged(row: Row, max_characters: int) -> tuple[Row, int]:
    """The row, with a fault where its text is none or too much, and its number of characters."""
    if row.fault is not None:
        return row, 0
    try:
        size = text_size(row.columns)
    except Fault as fault:
        return row._replace(fault=str(fault), excerpt=_beginning(row), columns={}), 0
    if size > max_characters:
        return row._replace(fault=TOO_MUCH_TEXT, excerpt=f"{size} characters: {_beginning(row)}", columns={}), 0
    return row, size


def _beginning(row: Row) -> str:
    """How a row begins, without writing all of it out."""
    for name, value in row.columns.items():
        if isinstance(value, str) and value:
            return f"{name}: {value[:200].encode('utf-8', 'replace').decode()}"
    return ", ".join(map(str, row.columns))[:200]
