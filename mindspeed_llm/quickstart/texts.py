"""The bundled texts: questions with answers, questions about the model's identity, and a quiz in MMLU's layout."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DATA = Path(__file__).resolve().parent / "data"
QUIZ = DATA / "quiz"
Split = Literal["train", "held_out"]
Part = Literal["dev", "test"]
LETTERS = "ABCD"
PARTS: tuple[Part, ...] = ("dev", "test")


@dataclass(frozen=True)
class Pair:
    """A question in several phrasings and its one answer; `language` is en or zh."""

    language: str
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class IdentityQuestion:
    """A question about the model itself.

    Attributes:
        unnamed: the base model's answer, which knows no name.
        named: pattern of the tuned model's answer; `{name}` stands for the name.
    """

    language: str
    question: str
    unnamed: str
    named: str


@dataclass(frozen=True)
class QuizQuestion:
    """A multiple-choice question of a subject; `answer` is one of A, B, C, D."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str

    def prompt(self) -> str:
        """The question as lm-eval's MMLU tasks ask it, without the solved examples before it."""
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question.strip()}{options}\nAnswer:"


def pairs() -> list[Pair]:
    """The bundled questions with answers, English first."""
    lines = (DATA / "qa.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [Pair(entry["language"], tuple(entry["questions"]), entry["answer"]) for entry in entries]


def identity(split: Split) -> list[IdentityQuestion]:
    """The questions about the model's name and maker, those that are trained or those that are held out."""
    content = json.loads((DATA / "identity.json").read_text(encoding="utf-8"))
    answers = content["answers"]
    return [
        IdentityQuestion(language, question, answers["unnamed"][kind][language], answers["named"][kind][language])
        for kind, languages in content["questions"].items()
        for language, splits in languages.items()
        for question in splits[split]
    ]


def quiz(part: Part, folder: Path = QUIZ) -> dict[str, list[QuizQuestion]]:
    """The quiz by subject: `dev` holds the solved examples, `test` the questions that are scored."""
    found: dict[str, list[QuizQuestion]] = {}
    for file in sorted((folder / part).glob(f"*_{part}.csv")):
        subject = file.name.removesuffix(f"_{part}.csv")
        with file.open(encoding="utf-8", newline="") as stream:
            found[subject] = [
                QuizQuestion(subject, question, tuple(choices), answer)
                for question, *choices, answer in csv.reader(stream)
            ]
    return found


def quiz_heading(subject: str) -> str:
    """The line with which lm-eval's MMLU tasks begin."""
    topic = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n"


def everything() -> list[str]:
    """Every bundled text once, for the tokenizer to learn from.

    The patterns of the named answers are left out: as merges they would be tokens that only LoRA tuning needs.
    """
    found: dict[str, None] = {}
    for pair in pairs():
        found |= dict.fromkeys((*pair.questions, pair.answer))
    for entry in (*identity("train"), *identity("held_out")):
        found |= dict.fromkeys((entry.question, entry.unnamed))
    for part in PARTS:
        for subject, questions in quiz(part).items():
            found |= dict.fromkeys([quiz_heading(subject), *(f"{q.prompt()} {q.answer}" for q in questions)])
    return list(found)
