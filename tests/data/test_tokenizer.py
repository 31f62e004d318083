"""Tokens of a model folder; the reference is transformers' AutoTokenizer."""

import json
import shutil
from pathlib import Path

import pytest

from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError

TEXTS = [
    "Give three tips.\n\n  indented\ttabs", "知识就是力量。", "emoji 👩‍👩‍👧 🇨🇳 é ñ ﬁ Ａ１",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<think>\n\n</think>\n\nanswer", "12345.678 ０", "", " leading and trailing ", "CRLF\r\nline\u200b",
]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3", "qwen_base", "llama3", "llama2", "deepseek", "glm"])
def test_ids_and_special_tokens_equal_transformers(golden: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = golden / "_tok" / name
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = [reference.encode(text, add_special_tokens=False) for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expected
    assert [ours.encode(text) for text in TEXTS] == expected
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )
    assert ours.vocab_size == len(reference)
    for ids in expected:
        assert ours.decode(ids) == reference.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    assert ours.id_to_token(5) == reference.convert_ids_to_tokens(5)


def test_a_token_the_table_lacks_has_no_id(golden: Path) -> None:
    assert load_tokenizer(golden / "_tok" / "llama3").token_to_id("<|im_end|>") is None


def test_tokens_only_the_configuration_knows_are_added(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    shutil.copytree(golden / "_tok" / "qwen3", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["1511"] = {"content": "<|extra|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).encode("a<|extra|>")[-1] == 1511
    config["added_tokens_decoder"]["1599"] = {"content": "<|far|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="1599.*1512"):
        load_tokenizer(folder)


def test_the_hash_changes_with_the_vocabulary_and_with_the_end_token_but_not_with_the_folder(
    golden: Path, tmp_path: Path
) -> None:
    first = load_tokenizer(golden / "_tok" / "qwen3").content_hash
    folder = tmp_path / "copy"
    shutil.copytree(golden / "_tok" / "qwen3", folder)
    assert load_tokenizer(folder).content_hash == first
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).content_hash == first
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        text = (folder / file).read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
        (folder / file).write_text(text)
    assert load_tokenizer(folder).content_hash != first
    assert load_tokenizer(golden / "_tok" / "glm").content_hash != first


def test_missing_and_broken_folders_are_named(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer.json.*config.json"):
        load_tokenizer(tmp_path)
    whole = (golden / "_tok" / "qwen3" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_json_goes_through_transformers(golden: Path, tmp_path: Path) -> None:
    model = json.loads((golden / "_tok" / "qwen3" / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "!", "bos_token": None, "unk_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode("Hello there, 你好")) == "Hello there, 你好"
    assert ours.token_to_id("!") == model["vocab"]["!"] == ours.eos_id
