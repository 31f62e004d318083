"""The tiny model and its tokenizer: same bytes from the same seed, and files transformers reads as Qwen3's."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.data.encode import ChatEncoder
from mindspeed_llm.data.templates import Message, get_template
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import UsageError
from mindspeed_llm.quickstart.make import make_base_rows, make_model
from mindspeed_llm.quickstart.model import INITIAL_STD, TinySize, config, draw
from mindspeed_llm.quickstart.names import check_name, random_name

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder of seed 1."""
    made = tmp_path_factory.mktemp("quickstart") / "hf"
    make_model(made, seed=1)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    """Its tokenizer."""
    return load_tokenizer(folder)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mindspeed_llm.quickstart.make", "model", "--folder", str(tmp_path / "hf")]
    subprocess.run(command, check=True, cwd=REPO, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    assert digests(tmp_path / "hf") == digests(folder)


def test_another_seed_gives_other_weights_and_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "hf", seed=2)
    ours, theirs = digests(folder), digests(tmp_path / "hf")
    assert {name for name in ours if ours[name] != theirs[name]} == {"model.safetensors"}


def test_weights_follow_the_rule_of_initialisation() -> None:
    weights = draw(TinySize(), vocabulary=1200, seed=3)
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            assert abs(float(weight.std()) / INITIAL_STD - 1) < 0.02, name
            assert abs(float(weight.mean())) < 4 * INITIAL_STD / weight.numel() ** 0.5, name
    assert 3e6 < sum(weight.numel() for weight in weights.values()) < 1e7


def test_transformers_qwen3_has_exactly_these_tensors(folder: Path) -> None:
    from transformers import AutoConfig, Qwen3ForCausalLM

    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(settings)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()} == expected
    assert settings.tie_word_embeddings and settings.head_dim == 64


def test_transformers_reads_the_same_ids_and_lays_a_chat_out_as_our_template_does(
    folder: Path, tokenizer: Tokenizer
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("Who are you?", "你是谁？我的 name is\n\nZorvex-7.", " A\n<think>\n\n</think>\n\n"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ours = ChatEncoder(get_template("qwen3"), tokenizer, "none").encode_prompt([Message(role="user", content="你好!")])
    chat = [{"role": "user", "content": "你好!"}]
    found = theirs.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False, return_dict=True)
    assert found["input_ids"] == ours
    thinking = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert thinking == "<|im_start|>user\n你好!<|im_end|>\n<|im_start|>assistant\n"


def test_control_tokens_are_single_ids_and_end_an_answer(folder: Path, tokenizer: Tokenizer) -> None:
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert tokenizer.encode(token) == [tokenizer.token_to_id(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    settings = config(TinySize(), tokenizer.vocab_size, tokenizer.eos_id or 0, tokenizer.pad_id or 0)
    assert settings["vocab_size"] == tokenizer.vocab_size == 1200


def test_rows_are_the_same_for_the_same_seed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for place in ("a", "b"):
        make_base_rows(tmp_path / place, tokenizer, seed=5)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_made_up_name_depends_on_the_seed_and_is_a_name_we_accept() -> None:
    names = [random_name(seed) for seed in range(50)]
    assert names == [random_name(seed) for seed in range(50)]
    assert len(set(names)) > 45
    assert all(check_name(name) == name for name in names)


@pytest.mark.parametrize("name", ["", "x", " Bob", "a" * 25, "Zoë", "Нина", "--", "Ann\n"])
def test_a_name_the_model_cannot_learn_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="QUICKSTART_NAME"):
        check_name(name)


@pytest.mark.parametrize("name", ["小智", "Ada Lovelace", "R2-D2", "云_9.1"])
def test_latin_and_chinese_names_are_accepted(name: str) -> None:
    assert check_name(name) == name
