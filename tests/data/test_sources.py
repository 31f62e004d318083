"""Sources: counts draw without replacement, subsets and mixtures are what they say, any range equals the whole."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from mindspeed_llm.data.self_cognition import is_self_cognition, self_cognition_rows
from mindspeed_llm.data.sources import Mixture, Source, Spec, detect_form, open_source, parse_spec
from mindspeed_llm.errors import InputError, UsageError


def write(file: Path, count: int, **more: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.stem
    file.write_text("".join(json.dumps({"n": f"{name}{i}", **more}) + "\n" for i in range(count)))
    return file


def names(rows: object) -> list[str]:
    return [row.columns["n"] for row in rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a/b", Spec("a/b")),
        ("a/b#500", Spec("a/b", None, 500)),
        ("swift-mix:sharegpt#250", Spec("swift-mix", "sharegpt", 250)),
        ("a/b:sub", Spec("a/b", "sub")),
        ("C:x", Spec("C:x")),
    ],
)
def test_a_source_is_path_subset_and_count(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec


def test_what_exists_under_the_whole_text_is_taken_literally(tmp_path: Path) -> None:
    file = write(tmp_path / "odd:name#5.jsonl", 3)
    assert parse_spec(str(file)) == Spec(str(file))
    assert parse_spec(f"{file}#2") == Spec(str(file), None, 2)
    for count in ("0", "x", ""):
        with pytest.raises(UsageError, match="no number of rows"):
            parse_spec(f"a#{count}")


def test_a_count_draws_without_replacement_by_the_seed_in_the_files_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 100)
    drawn = [names(open_source(f"{file}#30", (seed, 0)).rows()) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 30
    assert drawn[0] == sorted(drawn[0], key=lambda name: int(name[1:]))
    assert drawn[0] != names(open_source(f"{file}#30", (1, 1)).rows()), "the same source twice gives other rows"
    everywhere = Counter(name for seed in range(60) for name in names(open_source(f"{file}#30", (seed, 0)).rows()))
    assert len(everywhere) == 100 and min(everywhere.values()) > 5 and max(everywhere.values()) < 35


def test_a_count_beyond_the_size_repeats_whole_passes(tmp_path: Path) -> None:
    counts = Counter(names(open_source(f"{write(tmp_path / 'a.jsonl', 10)}#25", (1, 0)).rows()))
    assert len(counts) == 10 and sorted(counts.values()) == [2] * 5 + [3] * 5


def test_a_subset_is_a_sub_folder_or_the_files_that_begin_with_its_name(tmp_path: Path) -> None:
    for name in ("sharegpt/x.jsonl", "code-1.jsonl", "code-2.jsonl", "codex.jsonl"):
        write(tmp_path / name, 2)
    assert names(open_source(f"{tmp_path}:sharegpt", (0, 0)).rows()) == ["x0", "x1"]
    code = open_source(f"{tmp_path}:code", (0, 0))
    assert [f.name for f in code.files] == ["code-1.jsonl", "code-2.jsonl"] and code.unused
    with pytest.raises(InputError, match="no subset 'math'.*it holds: code-1"):
        open_source(f"{tmp_path}:math", (0, 0))


def test_an_id_is_found_in_the_hubs_cache_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "datasets--some--alpaca"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    write(home / "snapshots" / ("a" * 40) / "data" / "train.jsonl", 4)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert names(open_source("some/alpaca#2", (3, 0)).rows())
    write(home / "snapshots" / ("a" * 40) / "data" / "test.jsonl", 4)
    whole = open_source("some/alpaca", (3, 0))
    assert names(whole.rows()) == ["train0", "train1", "train2", "train3"], "of a hub's data set only its part train"
    assert [file.name for file in whole.unused] == ["test.jsonl"]
    with pytest.raises(InputError, match=r"some/other: no such file or folder, and the hub does not give some/other"):
        open_source("some/other", (0, 0))
    with pytest.raises(InputError, match="no id of the form owner/name"):
        open_source("nowhere.jsonl", (0, 0))


def mixture(tmp_path: Path, strategy: str, weights: tuple[float, ...] = ()) -> Mixture:
    files = [write(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 40), ("b", 30), ("c", 7))]
    specs = [str(files[0]), f"{files[1]}#12", f"{files[2]}#20"]
    return Mixture([open_source(s, (1, i)) for i, s in enumerate(specs)], weights, strategy, seed=1)


@pytest.mark.parametrize(
    ("strategy", "weights"), [("concat", ()), ("interleave_under", (3, 1, 1)), ("interleave_over", ())]
)
def test_ranges_of_a_mixture_put_together_are_the_mixture(
    tmp_path: Path, strategy: str, weights: tuple[float, ...]
) -> None:
    mix = mixture(tmp_path, strategy, weights)
    whole = names(mix.rows())
    assert len(whole) == mix.total
    for parts in (2, 5, len(whole) + 3):
        bounds = [mix.total * i // parts for i in range(parts + 1)]
        assert [n for b, e in zip(bounds, bounds[1:], strict=False) for n in names(mix.rows(b, e))] == whole


def test_interleaving_keeps_the_shares_and_ends_under_or_over(tmp_path: Path) -> None:
    under = Counter(n[0] for n in names(mixture(tmp_path, "interleave_under", (0.5, 0.25, 0.25)).rows()))
    assert under == {"a": 24, "b": 12, "c": 12}, "b is used up first"
    over = Counter(n[0] for n in names(mixture(tmp_path, "interleave_over", (0.5, 0.25, 0.25)).rows()))
    assert over == {"a": 40, "b": 20, "c": 20}
    first = "".join(n[0] for n in names(mixture(tmp_path, "interleave_over").rows()))[:30]
    assert len(set(first)) == 3, "the sources alternate from the start"


@pytest.mark.parametrize(("strategy", "weights"), [("concat", (1,)), ("interleave_over", (1, 2)),
                                                   ("interleave_over", (1, 0, 1))])  # fmt: skip
def test_weights_that_fit_no_mixture_are_refused(tmp_path: Path, strategy: str, weights: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--interleave-probs"):
        mixture(tmp_path, strategy, weights)


def test_self_cognition_fills_the_names_in_by_language() -> None:
    assert all(is_self_cognition(name) for name in ("self-cognition", "swift/self-cognition", "self_cognition"))
    rows = self_cognition_rows(["小黄", "Xiao Huang"], ["魔搭", "ModelScope"])
    assert len(rows) >= 80 and len({row.columns["question"] for row in rows}) == len(rows)
    for row in rows:
        text = row.columns["question"] + row.columns["answer"]
        chinese = any("一" <= c <= "鿿" for c in row.columns["question"])
        assert not ({"{", "}"} & set(text))
        wrong = ("Xiao Huang", "ModelScope") if chinese else ("小黄", "魔搭")
        assert not any(name in text for name in wrong)
    one = self_cognition_rows(["Bot"], ["Team"])
    assert sum("Bot" in row.columns["answer"] or "Team" in row.columns["answer"] for row in one) == len(one)


@pytest.mark.parametrize(
    ("names_given", "authors"), [([], ["a"]), (["a"], []), (["a", "b", "c"], ["a"]), ([" "], ["a"])]
)
def test_self_cognition_without_names_is_refused(names_given: list[str], authors: list[str]) -> None:
    with pytest.raises(UsageError, match="--model-"):
        self_cognition_rows(names_given, authors)


@pytest.mark.parametrize(
    ("columns", "handler", "keys"),
    [
        ({"instruction": "", "output": ""}, "AlpacaStyleInstructionHandler", {}),
        ({"query": "", "response": "", "system": ""}, "AlpacaStyleInstructionHandler",
         {"prompt": "query", "query": "", "response": "response", "system": "system"}),
        ({"messages": [{"role": "user", "content": ""}]}, "OpenAIInstructionHandler", {}),
        ({"conversations": [{"from": "human", "value": ""}]}, "SharegptStyleInstructionHandler",
         {"messages": "conversations"}),
        ({"text": ""}, "GeneralPretrainHandler", {}),
    ],
)  # fmt: skip
def test_the_columns_tell_the_format(tmp_path: Path, columns: dict, handler: str, keys: dict) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(columns) + "\n")
    found, found_keys = detect_form(Source("a", [file]))
    assert (found, json.loads(found_keys)) == (handler, keys)


def test_a_file_with_places_for_a_name_is_refused_for_the_built_in_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "who?", "response": "{{NAME}}, made by {{AUTHOR}}"}\n')
    with pytest.raises(InputError, match="places for a name and a maker.*--dataset self-cognition"):
        detect_form(Source("a", [tmp_path / "a.jsonl"]))


def test_columns_of_no_known_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1, "y": 2}\n')
    with pytest.raises(InputError, match="columns x, y are of no known format.*--handler-name"):
        detect_form(Source("a", [tmp_path / "a.jsonl"]))


def test_all_pairs_of_counts_and_passes_add_up(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 7)
    for count, begin in product((3, 7, 10, 21), (0, 2)):
        source = open_source(f"{file}#{count}", (0, 0))
        assert len(list(source.rows())) == count == len(list(source.rows(0, begin))) + len(list(source.rows(begin)))
