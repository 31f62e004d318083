"""The bundled texts and the rows made of them."""

import random
from collections import Counter
from pathlib import Path

import pytest

from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import InputError
from mindspeed_llm.quickstart.make import make_base_rows, make_identity_rows, make_model, read_rows, write_rows
from mindspeed_llm.quickstart.names import random_name
from mindspeed_llm.quickstart.rows import (
    Row,
    answer_rows,
    base_rows,
    identity_rows,
    in_batches,
    named_rows,
    quiz_rows,
    row,
    uncovered,
)
from mindspeed_llm.quickstart.texts import QUIZ, identity, pairs, quiz


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("quickstart") / "hf"
    make_model(folder, seed=1)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer) -> list[Row]:
    """Base rows of seed 1."""
    return base_rows(tokenizer.encode, tokenizer.decode, tokenizer.vocab_size, 1)


def test_there_are_about_a_hundred_questions_in_two_languages_each_with_one_answer() -> None:
    found = pairs()
    counts = Counter(pair.language for pair in found)
    assert len(found) >= 100 and min(counts["en"], counts["zh"]) >= 50
    asked = [question for pair in found for question in pair.questions]
    assert len(set(asked)) == len(asked)
    assert len({pair.answer for pair in found}) == len(found)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_language_has_thirty_trained_and_ten_held_out_phrasings(language: str) -> None:
    trained = {entry.question for entry in identity("train") if entry.language == language}
    held_out = {entry.question for entry in identity("held_out") if entry.language == language}
    assert len(trained) >= 30 and len(held_out) >= 10
    assert not trained & held_out


def test_every_named_answer_holds_the_name_and_no_unnamed_one_has_a_place_for_it() -> None:
    for entry in (*identity("train"), *identity("held_out")):
        assert "Zorvex" in entry.named.format(name="Zorvex")
        assert "{" not in entry.unnamed


@pytest.mark.parametrize("seed", range(20))
def test_every_token_of_a_random_name_is_an_answer_token_of_the_base(
    seed: int, base: list[Row], tokenizer: Tokenizer
) -> None:
    assert uncovered(random_name(f"test {seed}"), base, tokenizer.encode) == []


@pytest.mark.parametrize("seed", range(20))
def test_so_is_every_token_of_a_random_chinese_or_mixed_name(seed: int, tokenizer: Tokenizer, base: list[Row]) -> None:
    draw = random.Random(seed)
    chinese = "".join(chr(draw.randint(0x4E00, 0x9FFF)) for _ in range(3))
    latin = "".join(draw.choice("ABCXYZabcxyz0189-_. ") for _ in range(6))
    assert uncovered(chinese, base, tokenizer.encode) == []
    assert uncovered(f"K{latin}{chinese}7", base, tokenizer.encode) == []


def test_without_the_spelling_rows_names_would_not_be_covered(tokenizer: Tokenizer) -> None:
    missing = [bool(uncovered(random_name(seed), answer_rows(), tokenizer.encode)) for seed in range(20)]
    assert sum(missing) > 10


def test_identity_rows_are_half_new_and_half_replayed() -> None:
    replay = answer_rows()
    mixed = identity_rows("Zorvex", replay)
    assert sum("Zorvex" in entry["output"] for entry in mixed) == len(replay) == len(mixed) // 2
    assert {entry["instruction"] for entry in named_rows("Zorvex")} <= {entry["instruction"] for entry in mixed}


def test_held_out_phrasings_are_in_no_training_row(base: list[Row]) -> None:
    trained = {entry["instruction"] for entry in (*base, *identity_rows("Zorvex", answer_rows()))}
    assert not trained & {entry.question for entry in identity("held_out")}


def test_a_batch_order_keeps_every_row_and_puts_like_lengths_together(tokenizer: Tokenizer, base: list[Row]) -> None:
    ordered = in_batches(base, tokenizer.encode, 32, seed=1)
    key = Counter(str(entry) for entry in base)
    assert Counter(str(entry) for entry in ordered) == key

    def padding(rows: list[Row]) -> int:
        lengths = [len(tokenizer.encode(entry["instruction"] + entry["output"])) for entry in rows]
        batches = [lengths[start : start + 32] for start in range(0, len(lengths), 32)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(ordered) < padding(base) / 3


def test_the_quiz_has_mmlus_layout_and_uses_every_letter() -> None:
    assert {folder.name for folder in QUIZ.iterdir()} == {"dev", "test"}
    examples, questions = quiz("dev"), quiz("test")
    assert examples.keys() == questions.keys() and len(questions) >= 4
    for subject, tested in questions.items():
        assert (QUIZ / "test" / f"{subject}_test.csv").is_file() and (QUIZ / "dev" / f"{subject}_dev.csv").is_file()
        for entry in (*tested, *examples[subject]):
            assert len(set(entry.choices)) == 4 and entry.answer in "ABCD"
        assert Counter(entry.answer for entry in tested).keys() == set("ABCD")
    answers = Counter(entry.answer for tested in questions.values() for entry in tested)
    assert max(answers.values()) / sum(answers.values()) <= 0.35  # one letter alone misses the gate by far


def test_quiz_rows_are_token_for_token_what_lm_eval_asks(tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    from mindspeed_llm.evaluation.mmlu import load_tasks

    rows = {row_text(entry): entry for entry in quiz_rows(1, seed=1)}
    assert len(rows) == len(quiz_rows(3, seed=1)) / 3
    for settings in load_tasks(str(QUIZ), None):
        task = ConfigurableTask(config=dict(settings))
        for document in task.test_docs():
            asked = task.fewshot_context(document, settings["num_fewshot"])
            entry = rows.pop(asked)
            ids = [token for turn in entry["history"] for text in turn for token in tokenizer.encode(text)]
            ids += tokenizer.encode(entry["instruction"])
            assert ids == tokenizer.encode(asked)
            target = f" {'ABCD'[document['answer']]}"
            assert entry["output"] == target
            assert tokenizer.encode(asked + target) == ids + tokenizer.encode(target)
    assert not rows


def row_text(entry: Row) -> str:
    """The whole prompt of a row, earlier turns included."""
    return "".join(text for turn in entry["history"] for text in turn) + entry["instruction"]


def test_a_name_the_base_already_answers_with_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_base_rows(tmp_path, tokenizer, seed=1)
    with pytest.raises(InputError, match="already answers with the name 'Paris'"):
        make_identity_rows(tmp_path, tokenizer, "Paris", seed=1)


def test_a_name_with_tokens_the_base_lacks_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "base.jsonl", [row("Hi", "Hello")])
    with pytest.raises(InputError, match="tokens of the name 'Zorvex'"):
        make_identity_rows(tmp_path, tokenizer, "Zorvex", seed=1)


def test_rows_come_back_as_written_and_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    entries = [row("问", "答\n"), row("a", "b")]
    assert write_rows(tmp_path / "x.jsonl", entries) == 2
    assert read_rows(tmp_path / "x.jsonl") == entries
    with pytest.raises(InputError, match="run the step before again"):
        read_rows(tmp_path / "y.jsonl")
