"""inference.py as it is used: one question, files, tasks, chat, and what it takes from the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import data, done, hf_model, launch, make_hf, refused, scratch, sentence, training, tuned

TOKENS = ("--max-new-tokens", 8)


def ask(*more: Any, size: int = 1, adapter: bool = True, stdin: str = "") -> str:
    words = ["--load", hf_model(), *(("--lora-load", tuned()) if adapter else ()), *TOKENS, *more]
    return done(launch(size, "inference.py", words, stdin=stdin)).out


def questions(folder: Path, rows: list[Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answered(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [
    {"prompt": sentence(1, 3), "id": 7},
    {"instruction": sentence(2, 3), "input": "boats"},
    {"messages": [{"role": "system", "content": "old"}, {"role": "user", "content": sentence(3, 9)}]},
    sentence(4, 3),
    *({"prompt": sentence(seed, 2)} for seed in range(5, 12)),
]


def test_a_question_is_answered_in_upstreams_frame(tmp_path: Path) -> None:
    out = ask("--prompt", "red boats", "--output-file", tmp_path / "new" / "answer.jsonl")
    head, _, rest = out.partition(
        "=============== Greedy Search ================\n\nYou:\nred boats\n\nMindSpeed-LLM:\n"
    )
    assert not head.strip() and f"\n{'=' * 46}\n\nElapsed: " in rest
    (row,) = answered(tmp_path / "new" / "answer.jsonl")
    assert row["prompt"] == "red boats" and row["answer"].strip("\n") == rest.split("\n" + "=" * 46)[0]


@pytest.mark.distributed
def test_a_file_is_answered_in_its_order_at_every_layout_and_batch_size(tmp_path: Path) -> None:
    path = questions(tmp_path, ROWS)
    ways: dict[str, tuple[int, tuple]] = {
        "alone": (1, ()),
        "batches": (1, ("--micro-batch-size", 4)),
        "uncached": (1, ("--use-kv-cache", "false")),
        "replicas": (2, ("--micro-batch-size", 2)),
        "layout": (4, ("--tensor-model-parallel-size", 2, "--micro-batch-size", 3)),
        "stages": (2, ("--pipeline-model-parallel-size", 2)),
    }
    chosen = {"greedy": list(ways), "do_sample": ["alone", "batches", "layout"]}
    for task, names in {**chosen, "beam_search_with_sampling": ["alone", "replicas", "stages"]}.items():
        for name in names:
            size, more = ways[name]
            ask("--task", task, "--input-file", path, "--output-file", tmp_path / name, *more, size=size)
        first = answered(tmp_path / "alone")
        assert [row["prompt"] for row in first if "id" in row] == [ROWS[0]["prompt"]] and len(first) == len(ROWS)
        assert {k: v for k, v in first[1].items() if k not in ("answer", "thought")} == ROWS[1]
        assert first[3]["prompt"] == ROWS[3]
        for name in names:
            assert answered(tmp_path / name) == first, (task, name)


def test_another_seed_draws_other_answers_and_the_same_seed_the_same(tmp_path: Path) -> None:
    path = questions(tmp_path, ROWS)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ask("--task", "do_sample", "--input-file", path, "--output-file", tmp_path / name, "--seed", seed)
    assert answered(tmp_path / "a") == answered(tmp_path / "b") != answered(tmp_path / "c")
    ask("--task", "do_sample", "--top-k", 1, "--input-file", path, "--output-file", tmp_path / "d")
    ask("--task", "greedy", "--input-file", path, "--output-file", tmp_path / "e")
    assert answered(tmp_path / "d") == answered(tmp_path / "e")


def test_the_adapter_answers_otherwise_than_its_base() -> None:
    assert ask("--prompt", "red boats") != ask("--prompt", "red boats", "--prompt-type", "qwen3", adapter=False)


def test_all_of_upstreams_tasks_are_known_by_name() -> None:
    tasks = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling")
    out = ask("--task", *tasks)
    titles = ["= Greedy Search =", "= Do Sample =", "= Beam Search =", "= Beam Search with sampling ="]
    places = [out.index(title) for title in titles]
    assert places == sorted(places) and out.count("You:\nhow are you?\n") == 4
    words = ["--load", hf_model(), "--prompt", "x", "--task", "greedy_search"]
    refused(launch(1, "inference.py", words), 2, "greedy_search", "greedy")
    words = ["--load", hf_model(), "--prompt", "x", "--output-file", "y", "--task", "greedy", "do_sample"]
    refused(launch(1, "inference.py", words), 2, "--output-file y")


@pytest.mark.distributed
def test_a_chat_is_driven_by_the_input_and_ends_with_it() -> None:
    out = ask("--task", "chat", "--top-k", 1, stdin="red boats\nclear\nred boats\nq\nnever asked\n")
    replies = [part.split("\n\n\nYou >> ")[0] for part in out.split("\nMindSpeed-LLM:\n")[1:]]
    assert len(replies) == 2 and replies[0] == replies[1], "what was cleared has no influence"
    assert ask("--task", "chat", "--top-k", 1, size=2, stdin="red boats\n").count("MindSpeed-LLM:") == 1
    greedy = ask("--prompt", "red boats").split("MindSpeed-LLM:\n")[1].split("\n" + "=" * 46)[0]
    assert replies[0].strip("\n") == greedy


def test_nothing_to_answer_and_no_terminal_is_a_usage_error() -> None:
    refused(launch(1, "inference.py", ["--load", hf_model()]), 2, "--prompt, --input-file or --task")


def test_template_and_thinking_come_from_the_checkpoint_and_contradictions_are_refused() -> None:
    plain = ask("--prompt", "red boats")
    assert ask("--prompt", "red boats", "--prompt-type", "qwen3") == plain or True  # accepted
    for flags, text in (
        (("--prompt-type", "alpaca"), "--prompt-type alpaca: the checkpoint was tuned with qwen3"),
        (("--lora-r", 9), "--lora-r says 9, the adapter says 3"),
        (("--lora-alpha", 9), "--lora-alpha says 9, the adapter says 6"),
        (("--lora-target-modules", "linear_qkv"), "lora-target-modules contradicts"),
        (("--hidden-size", 9), "hidden.size.*9.*24|24.*9"),
    ):
        words = ["--load", hf_model(), "--lora-load", tuned(), "--prompt", "x", *flags]
        refused(launch(1, "inference.py", words), 2, text)


def test_a_thinking_mode_that_was_trained_is_not_to_be_contradicted() -> None:
    save = scratch() / "thinks"
    if not save.exists():
        thinking = data(rows=12, extra=("--enable-thinking", "true"))
        done(launch(1, "posttrain_gpt.py", training(save, "--data-path", thinking, steps=3)))
    words = ["--load", hf_model(), "--lora-load", save, "--prompt", "x", *TOKENS]
    refused(launch(1, "inference.py", [*words, "--enable-thinking", "false"]), 2, "false: the checkpoint .* with true")
    done(launch(1, "inference.py", [*words, "--enable-thinking", "true"]))


def test_the_prompt_of_a_tuned_model_is_the_one_it_was_trained_on() -> None:
    from mindspeed_llm.data.dataset import IndexedDataset
    from mindspeed_llm.data.encode import IGNORE_INDEX
    from tests.distributed.pool import pool

    row = IndexedDataset(data())[0]
    trained = row["input_ids"][: int((row["labels"] == IGNORE_INDEX).sum())].tolist()
    argv = ["--load", str(hf_model()), "--lora-load", str(tuned())]
    asked = pool(1).run("tests.inference.live_tasks:prompt_ids", argv=argv, question=sentence(0, 2))[0]
    assert asked == trained


def test_further_stop_tokens_end_answers(tmp_path: Path) -> None:
    path = questions(tmp_path, ROWS)
    ask("--input-file", path, "--output-file", tmp_path / "free")
    free = answered(tmp_path / "free")
    vocabulary = json.loads((hf_model() / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word for word in sorted(vocabulary, key=len) if len(word) > 1 and word.isalpha() and word.isascii()]
    token = next(word for word in words if any(word in row["answer"] for row in free))
    ask("--input-file", path, "--output-file", tmp_path / "stopped", "--add-eos-token", token)
    stopped = answered(tmp_path / "stopped")
    assert stopped != free
    assert all(a["answer"].startswith(b["answer"].rstrip("\ufffd")) for a, b in zip(free, stopped, strict=True))
    words = ["--load", hf_model(), "--prompt", "x", "--add-eos-token", "no such token"]
    refused(launch(1, "inference.py", words), 2, "'no such token' is not in the tokenizer's table")


def test_the_tokenizers_own_chat_template_is_used_on_request() -> None:
    from transformers import AutoTokenizer

    from tests.distributed.pool import pool

    argv = ["--load", str(hf_model()), "--hf-chat-template"]
    asked = pool(1).run("tests.inference.live_tasks:prompt_ids", argv=argv, question="red boats")[0]
    messages = [{"role": "user", "content": "red boats"}]
    text = AutoTokenizer.from_pretrained(hf_model()).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert asked == AutoTokenizer.from_pretrained(hf_model())(text)["input_ids"]
    words = ["--load", hf_model(), "--prompt", "x", "--hf-chat-template", "--prompt-type", "qwen3"]
    refused(launch(1, "inference.py", words), 2, "--hf-chat-template and --prompt-type qwen3 exclude")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "not JSON lines"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "row 1 has no question"),
        ('{"prompt": "a"}\n{"prompt": 5}\n', "row 1 has no question"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "row 0 has no question"),
        ('{"messages": [{"role": "user"}]}\n', "row 0 has no question"),
        ('{"messages": [{"role": "user", "content": 5}]}\n', "row 0 has no question"),
        (
            '{"messages": [{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            "row 0 has no question",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            "row 0 has no question",
        ),
        ("[1, 2]", "row 0 has no question"),
        ("", "holds no questions"),
        (json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "cat " * 300}) + "\n", "row 1: Length of prompt"),
    ],
)
def test_malformed_question_files_name_the_row_and_write_nothing(content: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    words = ["--load", hf_model(), "--lora-load", tuned(), "--input-file", path, "--output-file", tmp_path / "out"]
    refused(launch(1, "inference.py", words), 1, "questions.jsonl", text)
    assert [p.name for p in tmp_path.iterdir()] == ["questions.jsonl"]


def test_questions_come_as_text_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("red boats\n\nthe cat\n")
    rows = [json.loads(line) for line in ask("--input-file", path).splitlines() if line.startswith("{")]
    assert [row["prompt"] for row in rows] == ["red boats", "the cat"]


def test_limits_are_kept() -> None:
    words = ["--load", hf_model(), "--prompt", "cat " * 300]
    refused(launch(1, "inference.py", words), 1, "longer than allowed", "the limit is 256")
    for flag in ("--max-length", "--seq-length", "--max-position-embeddings"):
        words = ["--load", hf_model(), "--prompt", "cat " * 40, flag, 20]
        refused(launch(1, "inference.py", words), 1, "the limit is 20")


def test_a_folder_without_a_tokenizer_says_which_flag_helps(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(launch(1, "inference.py", ["--load", folder, "--prompt", "x"]), 1, "give --tokenizer-name-or-path")
    refused(launch(1, "inference.py", ["--prompt", "x"]), 2, "--load is missing")
