"""Words found by `re` and looked up in a table are the words and ids of the tokenizer library."""

import itertools
import re
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from mindspeed_llm.data import word_table as word_table_module
from mindspeed_llm.data.control_tokens import MarkedTokenizer, Spelling
from mindspeed_llm.data.split_pattern import Untranslatable, alphabet, explicit
from mindspeed_llm.data.word_table import BYTE_LEVEL_PATTERN

ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": BYTE_LEVEL_PATTERN,
    "qwen": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST,
    "llama3": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST,
    "gpt-oss": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+|\p{N}",
}
CORPUS = [
    "The kettle's lid, they'll say, isn't THE lid; we'd 12,345 of them -- in 1999!",
    "请用一句话解释什么是梯度。北京的秋天，天气晴朗。",
    "def area(r):\n    return 3.14 * r * r\n\n\n",
    "Ünïcödé straße Ωμέγα Привет мир こんにちは 안녕하세요 \u3000 wide",
]
CHARACTERS = "".join(chr(code) for first, last, _ in alphabet() for code in (first, last))
CONTROL = ("<|im_start|>", "<|im_end|>", "<think>")
# characters whose class depends on the library's version or on case folding, and a text no normaliser leaves alone
OUTSIDE = "\u017f\u212a\U0001f9ff\U0001fae0\u0e01\u0301e\u0301\ufdd0\U00010330"
texts = st.lists(
    st.one_of(
        st.sampled_from(CORPUS),
        st.sampled_from(["'S", "'LL", "'x", " ", "  ", "\n", " \r\n", "\t\t", "\u3000", "\xa0", "1234", "中文", "Ab"]),
        st.text(alphabet=CHARACTERS, max_size=6),
        st.text(max_size=4),
        st.sampled_from(OUTSIDE),
    ),
    max_size=8,
).map("".join)


def splitting(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The steps of a tokenizer that finds words by a pattern."""
    if pattern == BYTE_LEVEL_PATTERN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def make(pattern: str, normalizer: normalizers.Normalizer | None = None, **flags: bool) -> Tokenizer:
    """A small tokenizer with control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting(pattern)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet_of_bytes = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet_of_bytes)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, **flags) for token in CONTROL])
    return tokenizer


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words the library finds."""
    return [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_character_of_the_alphabet_is_in_the_classes_the_library_has_it_in(name: str) -> None:
    tokenizer, find = make(PATTERNS[name]), re.compile(explicit(PATTERNS[name])).findall
    every = [chr(code) for first, last, _ in alphabet() for code in range(first, last + 1)]
    for before, after in (("", ""), ("a", "b"), (" ", "1"), ("'", "\n")):
        text = "".join(f"{before}{character}{after}" for character in every)
        assert find(text) == words_of(tokenizer, text)


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.lists(st.one_of(st.text(CHARACTERS, max_size=5), st.sampled_from(CORPUS)), max_size=6).map("".join))
def test_texts_within_the_alphabet_have_the_librarys_words(name: str, text: str) -> None:
    assert re.findall(explicit(PATTERNS[name]), text) == words_of(make_once(name), text)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_character_outside_the_alphabet_is_in_no_word(name: str) -> None:
    find = re.compile(explicit(PATTERNS[name])).findall
    for character in OUTSIDE:
        if not any(first <= ord(character) <= last for first, last, _ in alphabet()):
            assert character not in "".join(find(f"a {character}b{character}\n{character}"))


@pytest.mark.parametrize(
    "pattern",
    [r"\bword", "a.b", "^a", "(?<=a)b", "[[:alpha:]]+", "[a-z&&[^b]]", "(?i:[a-z]+)", "(a", "a)", "\u0e01"],
)
def test_what_may_mean_something_else_in_re_is_left_to_the_library(pattern: str) -> None:
    with pytest.raises(Untranslatable):
        re.compile(explicit(pattern))


tokenizers_by_name: dict[str, Tokenizer] = {}


def make_once(name: str) -> Tokenizer:
    """The tokenizer of a pattern; texts are many."""
    return tokenizers_by_name.setdefault(name, make(PATTERNS[name]))


def marked(tokenizer: Tokenizer) -> tuple[MarkedTokenizer, Spelling]:
    """It with marked control tokens, and their spelling."""
    spelling = Spelling(list(CONTROL))
    return MarkedTokenizer(tokenizer, spelling), spelling


def ids_of(tokenizer: MarkedTokenizer, rows: Sequence[str]) -> list[list[int]]:
    """Ids of marked texts."""
    return [ids.tolist() for ids, _ in tokenizer.encode_spans(rows, [[] for _ in rows])]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_the_librarys_whatever_the_text(
    name: str, normalizer: normalizers.Normalizer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_table_module, "NEW_SHARE", 1.0)
    tokenizer = make(PATTERNS[name], normalizer)
    ours, spelling = marked(tokenizer)
    assert ours._table is not None

    @settings(max_examples=60, derandomize=True, deadline=None)
    @given(rows=st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4))
    def same(rows: list[list[str]]) -> None:
        written = [("<|im_start|>".join(row) + "<|im_end|>").replace("\ufdd0", "") for row in rows]
        expected = [row.ids for row in tokenizer.encode_batch_fast(written, add_special_tokens=False)]
        assert ids_of(ours, [spelling.literal(text) for text in written]) == expected

    same()
    assert len(ours._table.table) > 100


def test_a_full_table_is_begun_anew_and_one_of_new_words_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_table_module, "MOST_WORDS", 60)
    monkeypatch.setattr(word_table_module, "ENOUGH_WORDS", 5)
    tokenizer = make(PATTERNS["qwen"])
    ours, _ = marked(tokenizer)
    table = ours._table
    sizes = []
    for number in range(40):
        rows = [f"the lid of the kettle is the lid of the kettle w{chr(97 + number % 26)}{'x' * (number // 26)}"] * 3
        assert ids_of(ours, rows) == [row.ids for row in tokenizer.encode_batch_fast(rows, add_special_tokens=False)]
        sizes.append(len(table.table))
    assert max(sizes) <= 60 and sizes[-1] > len(CONTROL)
    new = ["".join(pair) for pair in itertools.product("qzxjk", repeat=4)]
    rows = [" ".join(new[:100])]
    assert ids_of(ours, rows) == [row.ids for row in tokenizer.encode_batch_fast(rows, add_special_tokens=False)]
    assert table.pause == word_table_module.PAUSE
    assert table.encode(["the lid"]) == [None]


def test_threads_share_a_table_that_is_replaced_under_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_table_module, "MOST_WORDS", 200)
    monkeypatch.setattr(word_table_module, "NEW_SHARE", 1.0)
    tokenizer = make(PATTERNS["qwen"])
    ours, _ = marked(tokenizer)
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(60):
            rows = [" ".join(map(str, draw.choice(["lid", "mir", "way", "xyz", "kettle"], 12))) for _ in range(5)]
            rows = [row + f" {'qwertyuiop'[: int(draw.integers(2, 9))]}{seed}" * 3 for row in rows]
            if ids_of(ours, rows) != [row.ids for row in tokenizer.encode_batch_fast(rows, add_special_tokens=False)]:
                wrong.append(rows[0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_control_tokens_that_take_white_space_are_left_to_the_library(flag: str) -> None:
    assert marked(make(PATTERNS["qwen"], **{flag: True}))[0]._table is None


def test_tokenizers_of_another_make_are_left_to_the_library() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert word_table_module.word_table(words, "x", {}, np.ones(1, np.int32)) is None
    twice = make(PATTERNS["qwen"])
    twice.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), splitting(PATTERNS["qwen"])])
    assert word_table_module.word_table(twice, "x", {}, np.ones(1, np.int32)) is None
    dropout = make(PATTERNS["qwen"])
    dropout.model.dropout = 0.1
    assert word_table_module.word_table(dropout, "x", {}, np.ones(1, np.int32)) is None


def test_a_library_that_divides_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of Unicode in which one character has moved to another class."""
    moved = tuple((first, last, "So" if first <= 0x3A9 <= last else kind) for first, last, kind in alphabet())
    monkeypatch.setattr("mindspeed_llm.data.split_pattern.alphabet", lambda: moved)
    assert word_table_module.word_table(make(PATTERNS["qwen"]), "x", {}, np.ones(1, np.int32)) is None
