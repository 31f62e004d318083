"""`--compat upstream` gives upstream's recorded tokens, for every recorded case of preprocessing."""

import json
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.errors import InputError, UsageError

CASES = Path(__file__).resolve().parents[3] / "shared" / "golden" / "cases"

# what is not to be reproduced (numbers: the recordings' README)
EXEMPT = {
    "A_pretrain_unknown_handler": "18: an unknown handler silently means running text; here refused",
    "A_merge": "files are merged, not made; see the tests of merging",
    "A_alpaca_no_prompt_type": "crash; here a one-line error",
    "A_mapkeys_bad_value": "crash; here a one-line error",
    "A_neatpack_nopack": "crash; here a one-line error",
    "A_pack_noseq_qwen": "crash; here a one-line error",
}
FLAGS_WITHOUT_EFFECT = {"--streaming": 0}
# recorded crashes whose remedy is an error message
REFUSED = {
    "A_alpaca_no_prompt_type": (UsageError, "--prompt-type"),
    "A_mapkeys_bad_value": (InputError, "nope"),
    "A_neatpack_nopack": (UsageError, "--pack"),
    "A_pack_noseq_qwen": (UsageError, "--seq-length"),
}
# recorded crashes that are files here -> the recorded case that shows what the files hold, None where none does
CRASHED = {
    "A_many_nsubs2": "A_many_w1",
    "A_pretrain_nsubs2": "A_pretrain_qwen3_eod",
    "A_pretrain_nsubs3": "A_pretrain_qwen3_eod",
    "A_sharegpt_emptyconv": None,
    "A_sharegpt_empty": None,
    "A_tools_qwen3": None,
    "A_openai_tools_qwen3": None,
    "A_tools_badjson_qwen3": None,
}


def expectation(name: str) -> dict:
    return json.loads((CASES / name / "expected.json").read_text())


def recorded_cases() -> list[str]:
    """The recorded cases that must come out token for token; empty without the recordings."""
    names = [folder.name for folder in sorted(CASES.glob("A_*"))]
    return [
        name for name in names if name not in EXEMPT and "deepseek4" not in name and expectation(name)["status"] == "ok"
    ]


def arguments(golden: Path, name: str, prefix: Path) -> list[str]:
    """A recorded case's command line, its output under `prefix`."""
    folder = golden / "cases" / name
    words = [
        w.replace("${CASE}", str(folder)).replace("${TOK}", str(golden / "_tok")) for w in expectation(name)["args"]
    ]
    words[words.index("--output-prefix") + 1] = str(prefix)
    return [word for word in words if word not in FLAGS_WITHOUT_EFFECT]


def run_case(golden: Path, name: str, out: Path, *more: str) -> tuple[dict, dict[str, IndexedFile]]:
    """Preprocess a recorded case's input: (our report, our files by the recorded names)."""
    args = expectation(name)["args"]
    prefix = out / args[args.index("--output-prefix") + 1].rpartition("/")[2]
    words = [*arguments(golden, name, prefix), *more]
    report = preprocess(parse(PreprocessOptions, words, "preprocess_data.py"))
    made = {file.stem: IndexedFile(file.with_suffix("")) for file in sorted(out.glob("*_document.idx"))}
    return report, made


@pytest.mark.parametrize("name", recorded_cases() or [pytest.param("none", marks=pytest.mark.skip("no recordings"))])
def test_every_recorded_case_comes_out_token_for_token(golden: Path, name: str, tmp_path: Path) -> None:
    _, files = run_case(golden, name, tmp_path, "--compat", "upstream")
    recorded = expectation(name)["files"]
    assert sorted(files) == sorted(recorded)
    for key, file in files.items():
        assert [file[i].tolist() for i in range(len(file))] == recorded[key]["sequences"], key
        assert file.documents.tolist() == recorded[key]["document_indices"]
        assert file.lengths.tolist() == recorded[key]["sequence_lengths"]
        assert file.offsets.tolist() == recorded[key]["sequence_pointers"]


@pytest.mark.parametrize(
    "name", ["A_alpaca_qwen3_think_true", "A_alpaca_qwen3_think_false", "A_alpaca_qwen3_think_none"]
)
def test_files_are_byte_equal_to_upstreams(golden: Path, name: str, tmp_path: Path) -> None:
    run_case(golden, name, tmp_path, "--compat", "upstream")
    for file in sorted((golden / "cases" / name).glob("out_packed_*")):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("mode", [(), ("--compat", "upstream")])
def test_recorded_crashes_of_the_command_line_are_one_line_errors(
    golden: Path, name: str, mode: tuple[str, ...], tmp_path: Path
) -> None:
    error, mentions = REFUSED[name]
    with pytest.raises(error, match=mentions):
        run_case(golden, name, tmp_path, *mode)
    assert list(tmp_path.iterdir()) == []
