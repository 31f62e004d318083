"""The text both networks read: real words in two languages, made into tokens by the folder's own tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from mindspeed_llm.checkpoint.recorded import TOKENIZER_FILES
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError

TEXT = (
    "The ferry leaves the northern pier at ten past six, before most of the town is awake. Nobody counts the"
    " passengers: a baker with flour on his sleeves, two nurses who have just finished their night, and a boy holding"
    " a cage with one grey pigeon. Halfway across, the captain switches off the radio (it only ever plays 3 songs) and"
    " says that the water has risen by 14 centimetres since March.\n\n"
    "到了对岸,雾还没有散。面包师把热面包分给大家,护士们坐在长椅上睡着了。男孩打开笼子,鸽子绕着灯塔飞了两圈,"
    "然后向南飞去。船长看了看表:六点四十分,比昨天早了五分钟。\n\n"
    "def tide(day, mean=2.5):\n    return mean + 0.8 * sin(day / 14.77 * 2 * pi)\n\n"
    "Later the nurses could not agree on what they had seen. One remembered a pigeon; the other was sure that it had"
    " been an owl, and that the boy had asked it, very politely, for the way home."
)
LENGTH = 200
"""Tokens read at most."""


class Tokens(NamedTuple):
    """What the networks read.

    Attributes:
        ids: [1, s] token ids.
        origin: how they were made, for the report.
    """

    ids: torch.Tensor
    origin: str


def read_tokens(folders: Iterable[Path | None], vocabulary: int, positions: int) -> Tokens:
    """The text as tokens of the first folder that has a tokenizer; without one, as its bytes modulo the vocabulary.

    Args:
        vocabulary: of the model; ids beyond it are taken modulo.
        positions: that the model has been made for; no more are read.
    """
    for folder in folders:
        if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
            continue
        try:
            ids = load_tokenizer(folder).encode(TEXT)
        except (InputError, OSError, ValueError, KeyError):
            continue
        if ids:
            return Tokens(as_row(ids, vocabulary, positions), f"tokenizer of {folder}")
    return Tokens(as_row(list(TEXT.encode()), vocabulary, positions), "bytes of the text modulo the vocabulary")


def as_row(ids: list[int], vocabulary: int, positions: int) -> torch.Tensor:
    """[1, s] of the first ids."""
    return torch.tensor(ids[: min(LENGTH, positions)], dtype=torch.long).remainder(vocabulary).unsqueeze(0)
