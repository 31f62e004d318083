"""The new name that LoRA tuning teaches: drawn from a seed, or the user's own."""

import random
import unicodedata

from mindspeed_llm.errors import UsageError

LONGEST = 24
CONSONANTS = "bcdfghjklmnprstvwxz"
VOWELS = "aeiouy"
JOINERS = " -_."


def random_name(seed: int | str) -> str:
    """A made-up name of two or three syllables, the same for the same seed."""
    draw = random.Random(f"quickstart name {seed}")
    syllables = [draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(draw.choice((2, 3)))]
    return ("".join(syllables) + draw.choice(CONSONANTS)).capitalize()


def check_name(name: str) -> str:
    """The name itself, when the tiny model can be taught it.

    Raises:
        UsageError: empty, too long, in neither of the two scripts the model reads, or a word its base data hold.
    """
    if not 2 <= len(name) <= LONGEST or name != name.strip():
        raise UsageError(f"QUICKSTART_NAME {name!r} has {len(name)} characters; choose 2 to {LONGEST}, no outer spaces")
    odd = [letter for letter in name if not (letter in JOINERS or _readable(letter))]
    if odd or not any(_readable(letter) for letter in name):
        raise UsageError(
            f"QUICKSTART_NAME {name!r} holds {''.join(odd) or 'no letter'!r}; use Latin letters without accents, "
            "digits, Chinese characters, spaces and -_."
        )
    return name


def _readable(letter: str) -> bool:
    """Whether the base rows teach the bytes of this letter."""
    if letter.isascii():
        return letter.isalnum()
    return "一" <= letter <= "鿿" and unicodedata.normalize("NFC", letter) == letter
