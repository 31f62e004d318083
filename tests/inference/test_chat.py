"""The conversation in the terminal: what is kept, what is shown, how it ends."""

import io
from typing import Any

import pytest

from mindspeed_llm import device
from mindspeed_llm.errors import InputError

device.select("cpu")  # before megatron-core is imported, as the programs do it
from mindspeed_llm.inference import chat as talk  # noqa: E402
from mindspeed_llm.inference.generate import Limits  # noqa: E402
from mindspeed_llm.inference.prompts import shown, split_thought  # noqa: E402


class Letters:
    """A prompter whose tokens are bytes; it remembers the messages it was given."""

    keeps_turns = True

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        self.asked.append([m["content"] for m in messages])
        return list(" ".join(m["content"] for m in messages).encode())

    def text(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def converse(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    lines: list[str],
    replies: list[str],
    turns: int = 3,
    length: int = 999,
) -> tuple[Letters, str]:
    """Drive a chat by `lines`; the model says `replies` in turn. -> (prompter, what was printed)."""
    prompter, said = Letters(), iter(replies)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr(talk, "_shared", lambda line: line)

    def answer(ids: list[int], each: Any) -> list[int]:
        reply = list(next(said).encode())
        for token in reply:
            each(token)
        return reply

    talk.chat(prompter, answer, Limits(10, length, frozenset()), turns, speaker=True)
    return prompter, capsys.readouterr().out


def test_the_newest_turns_are_kept_as_context(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prompter, _ = converse(monkeypatch, capsys, ["q1", "q2", "q3", "q4"], ["a1", "a2", "a3", "a4"], turns=2)
    assert prompter.asked == [
        ["q1"],
        ["q1", "a1", "q2"],
        ["q1", "a1", "q2", "a2", "q3"],
        ["q2", "a2", "q3", "a3", "q4"],
    ]
    prompter, _ = converse(monkeypatch, capsys, ["q1", "q2"], ["a1", "a2"], turns=0)
    assert prompter.asked == [["q1"], ["q2"]]


@pytest.mark.parametrize("word", talk.CLEAR)
def test_clear_forgets_and_empty_lines_are_nothing(word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prompter, _ = converse(monkeypatch, capsys, ["q1", "", "  ", word, "q2"], ["a1", "a2"])
    assert prompter.asked == [["q1"], ["q2"]]


@pytest.mark.parametrize("word", [*talk.QUIT, " quit "])
def test_quit_and_the_end_of_input_end_the_talk(word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prompter, out = converse(monkeypatch, capsys, ["q1", word, "q2"], ["a1", "a2"])
    assert prompter.asked == [["q1"]] and out.count("MindSpeed-LLM:") == 1
    assert "[q, quit, exit]" in out and "[clear, new]" in out and "\n\nYou >> " in out


def test_old_turns_make_room_for_the_answer_and_a_question_too_long_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = ["one", "two", "three", "x" * 60, "four"]
    prompter, out = converse(monkeypatch, capsys, lines, ["a" * 9, "b" * 9, "c", "d"], turns=9, length=40)
    prompts = [" ".join(asked) for asked in prompter.asked]
    assert f"one {'a' * 9} two" in prompts
    # "one" and its answer would leave "three" less than the 10 tokens an answer may have
    assert f"two {'b' * 9} three" in prompts and f"two {'b' * 9} three c four" in prompts
    assert "the prompt has 60 tokens, the limit is 40" in out and out.count("MindSpeed-LLM:") == 4


def test_an_answer_is_streamed_as_whole_characters_without_thought_marks() -> None:
    class Out(io.StringIO):
        pieces: list[str] = []

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return super().write(text)

    out = Out()
    stream = talk.Stream(Letters(), out)  # type: ignore[arg-type]
    text = "<think>\n想一想 <b>\n</think>\n\n你好, <thinly> 世界 🙂<"
    for token in text.encode():
        stream(token)
    stream.finish()
    assert out.getvalue() == "想一想 <b>\n\n\n你好, <thinly> 世界 🙂<"
    assert not any("\ufffd" in piece or "think>" in piece for piece in out.pieces)
    assert len([piece for piece in out.pieces if piece]) > 15, "it comes piece by piece"


def test_what_was_thought_is_told_from_what_was_said() -> None:
    assert split_thought("<think>\na\n</think>\n\nb") == ("a", "b")
    assert split_thought("a\n</think>\n\nb") == ("a", "b")
    assert split_thought("b") == ("", "b") and split_thought("<think>\nb") == ("", "b")
    assert shown("<think>\na\n</think>\n\nb") == "a\n\n\nb"


def test_an_empty_prompt_and_one_without_room_are_refused() -> None:
    limits = Limits(5, 10, frozenset())
    assert [limits.room([1] * n) for n in (1, 5, 9)] == [5, 5, 1]
    for prompt, text in (([], "is empty"), ([1] * 10, "longer than allowed")):
        with pytest.raises(InputError, match=text):
            limits.room(prompt)
