"""A conversation in the terminal: history, streaming, quit and clear."""

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

from mindspeed_llm.data.templates import Message
from mindspeed_llm.errors import InputError
from mindspeed_llm.inference.generate import Limits
from mindspeed_llm.inference.prompts import THOUGHT_MARKS, Prompter, split_thought

QUIT = ("q", "quit", "exit")
CLEAR = ("clear", "new")
BANNER = f"""
===========================================================
1. If you want to quit, please enter one of [{", ".join(QUIT)}]
2. To create new title, please enter one of [{", ".join(CLEAR)}]
===========================================================
"""

Answer = Callable[[list[int], Callable[[int], None] | None], list[int]]


class Stream:
    """Prints an answer as its tokens come, without thought marks and never half a character."""

    def __init__(self, prompter: Prompter, out: TextIO) -> None:
        self.prompter, self.out = prompter, out
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, token: int) -> None:
        """Take one token."""
        self.ids.append(token)
        text = self._visible(self.prompter.text(self.ids))
        if text.endswith("\ufffd") or any(mark.startswith(text[at:]) for at, mark in _tails(text)):
            return  # an unfinished character or mark: more is to come
        self._print(text)

    def finish(self) -> None:
        """Print what was held back."""
        self._print(self._visible(self.prompter.text(self.ids)))

    def _visible(self, text: str) -> str:
        for mark in THOUGHT_MARKS:
            text = text.replace(mark, "")
        return text.lstrip("\n")

    def _print(self, text: str) -> None:
        self.out.write(text[len(self.printed) :])
        self.out.flush()
        self.printed = text


def _tails(text: str) -> list[tuple[int, str]]:
    """(start, mark) of every end of `text` that may be the beginning of a thought mark."""
    return [(len(text) - n, mark) for mark in THOUGHT_MARKS for n in range(1, len(mark)) if text.endswith(mark[:n])]


def read_line() -> str | None:
    """One question from the terminal; None at its end."""
    try:
        return input("\n\nYou >> ")
    except EOFError:
        return None


def chat(prompter: Prompter, answer: Answer, limits: Limits, history_turns: int, speaker: bool) -> None:
    """Talk until quit.

    The question is read by rank 0 and shared, so every rank runs the same generation.

    Args:
        answer: (prompt ids, callback per token) -> answer ids.
        limits: of a prompt and its answer; the oldest turns make room for them.
        history_turns: question-answer pairs kept as context, the newest ones.
        speaker: whether this rank reads and prints.
    """
    history: list[tuple[str, str]] = []
    if speaker:
        print(BANNER, flush=True)
    while True:
        line = _shared(read_line() if speaker else None)
        if line is None or line.strip() in QUIT:
            return
        if line.strip() in CLEAR:
            history.clear()
            continue
        if not line.strip():
            continue
        try:
            prompt = fitting_prompt(prompter, history[-history_turns:] if history_turns else [], line, limits)
        except InputError as error:  # of this question; the talk goes on
            if speaker:
                print(f"\n{error}", flush=True)
            continue
        stream = Stream(prompter, sys.stdout) if speaker else None
        if speaker:
            print("\nMindSpeed-LLM:")
        ids = answer(prompt, stream)
        if stream is not None:
            stream.finish()
            print(flush=True)
        history.append((line, split_thought(prompter.text(ids))[1]))


def fitting_prompt(prompter: Prompter, history: Sequence[tuple[str, str]], question: str, limits: Limits) -> list[int]:
    """The prompt of a question with as many of the newest turns as leave room for the longest answer.

    Raises:
        InputError: the question alone leaves no room at all.
    """
    kept = list(history) if prompter.keeps_turns else []
    while True:
        messages: list[Message] = []
        for asked, reply in kept:
            messages += [Message(role="user", content=asked), Message(role="assistant", content=reply)]
        prompt = prompter.encode([*messages, Message(role="user", content=question)])
        if not kept:
            limits.room(prompt)
            return prompt
        if len(prompt) + limits.max_new_tokens <= limits.max_length:
            return prompt
        kept.pop(0)


def _shared(line: str | None) -> str | None:
    """Rank 0's line on every rank."""
    lines = [line]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(lines, src=0)
    return lines[0]
