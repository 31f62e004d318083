"""What is shown is what is trained: previews, existing files, and the report's page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.complete import length_histogram
from mindspeed_llm.data.dataset import IndexedDataset
from mindspeed_llm.data.preprocess import main, preprocess
from mindspeed_llm.data.preview import Segment, as_html, as_text, show_row
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError, UsageError


def decode(ids: list[int]) -> str:
    return "".join(chr(i) for i in ids)


def row(text: str, trained: str) -> tuple[np.ndarray, np.ndarray]:
    """ids of the characters, labels where `trained` has a ^."""
    ids = np.array([ord(c) for c in text])
    return ids, np.where(np.array(list(trained.ljust(len(text)))) == "^", ids, -100)


def test_segments_are_runs_of_trained_and_other_tokens_and_say_the_whole_text() -> None:
    shown = show_row("row 1", *row("ask: yes\nbye", "     ^^^^"), decode)
    assert shown.segments == [Segment("ask: ", False), Segment("yes\n", True), Segment("bye", False)]
    assert (shown.tokens, shown.trained) == (12, 4)
    assert as_text(shown, colour=False) == "--- row 1: 12 tokens, 4 trained (33%)\nask: ⟦yes↵\n⟧bye"
    coloured = as_text(shown, colour=True)
    assert "\x1b[1;32myes↵\x1b[0m\n" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m|↵", "", coloured).endswith("ask: yes\nbye")
    assert "<mark>yes↵\n</mark>bye" in as_html(shown)


def test_padding_is_counted_and_labels_that_are_other_tokens_are_told() -> None:
    ids, labels = row("ab~~~~", " ^")
    labels[1] = ord("E")
    shown = show_row("row", ids, labels, decode)
    assert shown.segments == [Segment("a", False), Segment("b", True)]
    assert shown.notes == ["4 times '~' follow", "token 1 'b' has the label 'E'"]
    assert show_row("text", ids[:2], None, decode).trained == 2 and show_row("none", ids[:0], None, decode).tokens == 0


def test_html_is_escaped() -> None:
    text = as_html(show_row("<r>", *row("<b>&", "   ^"), decode))
    assert "&lt;b&gt;<mark>&amp;</mark>" in text and "<b>" not in text and "&lt;r&gt;" in text


def test_the_histogram_has_round_edges_and_counts_every_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 1777, 5000)
    made = length_histogram(lengths)
    assert sum(made["rows"]) == 5000 and made["edges"][:3] == [0, 50, 100] and made["edges"][-1] > 1776
    assert length_histogram(np.zeros(0, int))["rows"] == [0]


@pytest.fixture
def words(golden: Path, tmp_path: Path) -> list[str]:
    rows = [{"instruction": f"Question {i} <script>?", "output": f"Answer {i}"} for i in range(6)]
    rows[2]["output"] = None  # type: ignore[assignment]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--input", str(source), "--tokenizer-name-or-path", str(golden / "_tok" / "qwen3"), "--handler-name",
            "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3"]  # fmt: skip


def test_a_preview_prints_the_first_rows_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = set(tmp_path.rglob("*"))
    assert main([*words, "--preview", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- row ") == 4 and "⟦Answer 0<|im_end|>↵\n⟧" in out and "⟦Answer 4" in out
    assert "--- not written: row 3 of" in out and "column 'output' is missing or null" in out
    assert set(tmp_path.rglob("*")) == before


def test_a_preview_numbers_rows_through_and_says_where_there_are_no_more(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "rows.txt"
    source.write_text("".join(f"text {i}\n" for i in range(1, 621)))
    common = ["--input", str(source), "--tokenizer-name-or-path", str(golden / "_tok" / "qwen3")]
    for asked, last in ((610, "610"), (700, "620")):
        assert main([*common, "--preview", str(asked)]) == 0
        out = capsys.readouterr().out
        numbers = re.findall(r"--- row (\d+), text: .*\n⟦text (\d+)⟧", out)
        assert len(numbers) == int(last) and all(a == b for a, b in numbers) and numbers[-1][0] == last
        assert ("--- 620 of 700 rows: the input ends" in out) is (asked == 700)


def test_existing_files_are_printed_as_they_were_previewed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main([*words, "--preview", "2"])
    preview = capsys.readouterr().out
    main([*words, "--output-prefix", str(tmp_path / "x")])
    capsys.readouterr()
    assert main(["--inspect", str(tmp_path / "x"), "--preview", "2"]) == 0
    inspected = capsys.readouterr().out
    assert inspected.startswith(f"{tmp_path / 'x'}_packed_attention_mask_document: 5 sequences,")
    assert [line for line in preview.splitlines() if "not written" not in line] == inspected.splitlines()[3:]
    (tmp_path / "x_report.json").unlink()
    with pytest.raises(UsageError, match="no report that names a tokenizer"):
        main(["--inspect", str(tmp_path / "x")])
    with pytest.raises(InputError, match=r"no file nothing\*_document\.idx"):
        main(["--inspect", str(tmp_path / "nothing")])


def test_neat_packs_are_inspected_with_the_rows_in_them(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    report = preprocess(
        parse(
            PreprocessOptions,
            [*words, "--output-prefix", str(tmp_path / "x"), "--pack", "--neat-pack", "--seq-length", "256"],
            "preprocess_data.py",
        )  # fmt: skip
    )
    main(["--inspect", str(tmp_path / "x")])
    out = capsys.readouterr().out
    sizes = np.bincount(IndexedDataset(tmp_path / "x")[0]["attention_mask"])
    assert f"a neat pack of 5 rows of {', '.join(map(str, sizes[1:]))} tokens" in out
    assert f"note: {sizes[0]} times '<|endoftext|>' follow" in out
    assert report["fill"] == pytest.approx(sizes[1:].sum() / 256)
    main(["--inspect", str(tmp_path / "x_packed_labels_document.idx")])
    assert capsys.readouterr().out == out, "one of the files stands for its prefix"


class _Check(HTMLParser):
    """Collects the text and every address a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.addresses, self.tags = "", [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_says_what_the_report_says(words: list[str], tmp_path: Path) -> None:
    command = [*words, "--output-prefix", str(tmp_path / "x")]
    report = preprocess(parse(PreprocessOptions, command, "preprocess_data.py"))
    page = _Check()
    page.feed((tmp_path / "x_report.html").read_text(encoding="utf-8"))
    assert not page.addresses and "script" not in page.tags and "svg" in page.tags and page.tags.count("mark") == 3
    assert "column 'output' is missing or null" in page.text and "Question 0 <script>?" in page.text
    share = report["trained_tokens"] / report["tokens"]
    assert f"tokens that are trained{share:.2%}" in page.text.replace("\n", "")
    for number in (report["rows"]["read"], report["tokens"], report["longest_row"]):
        assert f"{number:,}" in page.text
    assert load_tokenizer(words[3]).content_hash[:16] in page.text
