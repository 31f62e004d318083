"""Options that contradict one another, need another or would have no effect: told in one line, exit 2."""

import json
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.plan import make_plan
from mindspeed_llm.errors import UsageError

RUN = ["--output-prefix", "x", "--tokenizer-name-or-path", "t"]
FILE = ["--input", "rows.jsonl"]
CHAT = ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3"]


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (["--truncation-strategy", "left"], "--truncation-strategy left needs --max-length"),
        (["--max-length", "9", "--seq-length", "8"], "--max-length 9 is above --seq-length 8"),
        (["--max-length", "9", "--compat", "upstream"], "with --compat upstream give --seq-length"),
        (["--mask-history", "--train-on-prompt"], "give one"),
        (["--shard-index", "0"], "--shard-index needs --num-shards"),
        (["--num-shards", "3", "--shard-index", "3"], "must be 0 to 2"),
        (["--num-shards", "100000"], "--num-shards 100000: must be at most 99999"),
        (["--pad-to-multiple-of", "0"], "--pad-to-multiple-of 0: must be at least 1"),
        (["--pack"], "--pack needs --seq-length"),
        (["--neat-pack"], "--neat-pack needs --pack"),
        (["--model-name", "Bot"], "--model-name fills the source self-cognition; name it in --dataset"),
        (["--model-author", "Team"], "--model-author fills self-cognition"),
        (["--max-samples", "3"], "--max-samples belongs to LlamaFactoryInstructionHandler; write --dataset PATH#COUNT"),
        (["--dataset-dir", "d"], "--dataset-dir belongs to --handler-name LlamaFactoryInstructionHandler"),
        (["--mix-strategy", "interleave_over"], "--mix-strategy mixes several sources"),
        (["--interleave-probs", "1,2"], "--interleave-probs are shares of several sources"),
        (["--dataset", "y"], "both are given"),
        (["--inspect", "x"], "--inspect prints files that exist; leave --input and --dataset out"),
        (["--merge-group-keys", "a", "--num-shards", "2"], "leave --num-shards, --shard-index and --preview out"),
        (["--preview", "-1"], "--preview -1: must not be negative"),
        (["--split-sentences"], "--split-sentences is not accepted: .*one sentence per row"),
        (["--keep-newlines"], "--keep-newlines is not accepted"),
        (["--merge-file", "m"], "--merge-file is not accepted: .*--tokenizer-name-or-path"),
        (["--drop-thinking"], "--drop-thinking is not accepted: --enable-thinking false removes thoughts"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(words: list[str], mentions: str) -> None:
    with pytest.raises(UsageError, match=mentions) as refused:
        parse(PreprocessOptions, [*RUN, *FILE, *words], "preprocess_data.py")
    assert "\n" not in str(refused.value)


def test_entries_and_sources_are_not_mixed(golden: Path) -> None:
    words = ["--output-prefix", "x", "--tokenizer-name-or-path", str(golden / "_tok" / "qwen3")]
    words += ["--dataset", "e", "--handler-name", "LlamaFactoryInstructionHandler", "--dataset-dir", "d"]
    with pytest.raises(UsageError, match="entries of dataset_info.json that --input names.*give --input"):
        make_plan(parse(PreprocessOptions, [*words, "--prompt-type", "qwen3"], "preprocess_data.py"))


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        ([*CHAT, "--n-subs", "3"], "--n-subs has no effect: only upstream's packing"),
        ([*CHAT, "--json-keys", "a"], "--json-keys has no effect: AlpacaStyleInstructionHandler reads other columns"),
        ([*CHAT, "--dataset-additional-keys", "labels"], "--dataset-additional-keys has no effect"),
        ([*CHAT, "--pad-to-multiple-of", "8"], "--pad-to-multiple-of has no effect"),
        (["--mask-history"], "--mask-history has no effect"),
        (["--train-on-prompt"], "--train-on-prompt has no effect"),
        ([*CHAT, "--pad-to-multiple-of", "1", "--json-keys", "text"], None),
        (["--json-keys", "a", "b", "--pad-to-multiple-of", "8"], None),
    ],
)
def test_options_that_change_nothing_for_the_handler_are_said(
    golden: Path, tmp_path: Path, words: list[str], mentions: str | None
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "q", "output": "a", "a": "x", "b": "y"}) + "\n")
    run = ["--output-prefix", str(tmp_path / "x"), "--tokenizer-name-or-path", str(golden / "_tok" / "qwen3")]
    plan = make_plan(parse(PreprocessOptions, [*run, "--input", str(rows), *words], "preprocess_data.py"))
    assert [mentions in line for line in plan.warnings] == [True] if mentions else not plan.warnings
