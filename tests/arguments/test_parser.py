"""A command line, a YAML job and the environment are read as documented, and anything else is refused by name."""

import json
import shlex
from dataclasses import dataclass
from typing import ClassVar

import pytest

from mindspeed_llm.arguments.flags import flags_of
from mindspeed_llm.arguments.parser import CommandLineError, accepted, given, parse, to_dict, to_json
from mindspeed_llm.arguments.programs import PROGRAMS, EvaluateOptions, InferenceOptions, PosttrainOptions
from mindspeed_llm.arguments.schema import Program, option


def posttrain(*words: str) -> PosttrainOptions:
    return parse(PosttrainOptions, list(words), "posttrain_gpt.py")


def refusal(*words: str, program: type[Program] = PosttrainOptions) -> str:
    with pytest.raises(CommandLineError) as caught:
        parse(program, list(words), "posttrain_gpt.py")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "words",
    [
        ["--lora-r", "16"],
        ["--lora_r", "16"],
        ["--lora-r=16"],
        ["--lora_rank=16"],
        ["--lora-r", "8", "--lora_r", "16"],
    ],
)
def test_every_spelling_of_a_name_and_its_value_means_the_same_and_the_last_one_wins(words: list[str]) -> None:
    assert posttrain(*words).lora.lora_r == 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16", "False"], False),
        (["--bf16=false"], False),
        ([], False),
    ],
)
def test_a_boolean_is_a_bare_flag_or_takes_true_or_false(words: list[str], expected: bool) -> None:
    assert posttrain(*words).training.bf16 is expected


def test_a_default_of_true_can_be_turned_off() -> None:
    assert posttrain().lora.lora_ckpt_filter is True
    assert posttrain("--lora-ckpt-filter", "false").lora.lora_ckpt_filter is False


def test_lists_take_words_up_to_the_next_flag_and_keep_their_order() -> None:
    options = posttrain("--lora-target-modules", "linear_fc1", "linear_qkv", "--spec", "pkg.module", "layer_spec")
    assert options.lora.lora_target_modules == ["linear_fc1", "linear_qkv"]
    assert options.model.spec == ["pkg.module", "layer_spec"]


def test_numbers_below_zero_are_values_and_not_flags() -> None:
    @dataclass
    class Cold(Program):
        """Cold."""

        temperature: float = option(0.0, help="Degrees.")
        steps: int = option(0, help="Steps.")

    options = parse(Cold, ["--temperature", "-1e-3", "--steps", "-4"], "cold.py")
    assert (options.temperature, options.steps) == (-1e-3, -4)


def test_a_value_that_looks_like_a_flag_is_given_with_an_equals_sign() -> None:
    options = parse(InferenceOptions, ["--prompt=--what is this?"], "inference.py")
    assert options.generation.prompt == "--what is this?"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora-rr", "16"], ["unknown option --lora-rr", "--lora-r"]),
        (["--micro-batch", "1"], ["unknown option --micro-batch", "--micro-batch-size"]),
        (["--stage", "sff"], ["--stage", "'sff'", "did you mean 'sft'"]),
        (["--lr", "fast"], ["--lr expects a number", "'fast'"]),
        (["--lr", "nan"], ["--lr expects a number", "'nan'"]),
        (["--train-iters", "1e3"], ["--train-iters expects an integer", "steps", "'1e3'"]),
        (["--lr"], ["--lr takes one value", "got none"]),
        (["--lr", "1", "2"], ["--lr takes one value", "'1 2'"]),
        (["--bf16", "maybe"], ["'maybe'", "--bf16"]),
        (["--bf16=maybe"], ["--bf16 expects true|false", "'maybe'"]),
        (["--spec", "only_one"], ["--spec takes exactly 2 values, got 1"]),
        (["--lora-target-modules"], ["--lora-target-modules", "got none"]),
        (["--lora-init", "pisa"], ["'pisa'", "did you mean 'pissa'"]),
        (["train"], ["'train'"]),
        (["--bf16", "--fp32"], ["--bf16 and --fp32"]),
        (["--attention-dropout", "0.1"], ["--attention-dropout 0.1", "use 0"]),
        (["--train-iters", "5", "--epochs", "2"], ["--train-iters 5", "--epochs 2"]),
        (["--min-lr", "1", "--lr", "0.1"], ["--min-lr 1.0", "--lr 0.1"]),
        (["--split", "a,b"], ["--split 'a,b'"]),
        (["--fp16"], ["--fp16", "--bf16"]),
        (["--qlora"], ["--qlora is not accepted"]),
        (["--transformer-impl", "transformer_engine"], ["transformer_engine", "use local"]),
        (["--use-flash-attn", "twice"], ["--use-flash-attn takes no value"]),
        (["--config", "/nowhere/job.yaml"], ["--config /nowhere/job.yaml"]),
    ],
)
def test_a_wrong_option_is_refused_in_one_line_naming_it_and_the_remedy(words: list[str], said: list[str]) -> None:
    message = refusal(*words)
    for part in said:
        assert part in message


@dataclass
class Demanding(Program):
    """A program that cannot do without two options."""

    SCRIPT: ClassVar[str] = "demanding.py"
    EXAMPLE: ClassVar[str] = "python demanding.py --source a --target b"
    source: str = option(help="From.")
    target: str = option(help="To.")


def test_required_options_are_all_named_when_missing() -> None:
    assert "--source, --target must be given" in refusal(program=Demanding)
    assert "--save-dir must be given" in refusal("--load-model-type", "hf", program=PROGRAMS["convert_ckpt.py"])


def test_a_name_is_never_abbreviated() -> None:
    assert "unknown option --tensor-model-parallel" in refusal("--tensor-model-parallel", "2")


def test_upstream_flags_that_need_nothing_are_accepted_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    loss_scale, backend = ("--initial-loss-scale", "4096"), ("--distributed-backend", "nccl")
    options = posttrain("--use-mcore-models", "--use-flash-attn", *loss_scale, *backend)
    listed = ["--use-mcore-models", "--use-flash-attn", "--initial-loss-scale", "--distributed-backend"]
    assert accepted(options) == listed
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(flag in said for flag in listed)


def test_only_rank_zero_lists_the_flags_that_need_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    posttrain("--use-mcore-models")
    assert capsys.readouterr().err == ""


def test_a_refused_flag_set_to_false_asks_for_nothing_and_passes() -> None:
    posttrain("--fp16", "false")


def test_given_names_what_the_user_set_and_nothing_else(tmp_path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("optimizer:\n  lr: 1e-4\nseed: 7\n")
    options = posttrain("--config", str(job), "--lora_rank", "4")
    assert given(options) == {"lr", "seed", "lora_r"}
    assert given(PosttrainOptions()) == frozenset()


def test_a_yaml_job_is_read_flat_or_in_sections_of_any_name_and_the_command_line_wins(tmp_path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "whatever:\n  lr: 1e-4\n  lora-target-modules: [linear_qkv]\n  deeper: {seed: 7, bf16: true}\n"
        "data_path: one/prefix\nenable_thinking: true\nuse_flash_attn: true\ntrain_iters: null\n"
    )
    options = posttrain("--config", str(job), "--seed", "8")
    assert options.optimizer.lr == 1e-4
    assert options.lora.lora_target_modules == ["linear_qkv"]
    assert (options.training.seed, options.training.bf16) == (8, True)
    assert options.data.data_path == ["one/prefix"]
    assert options.tokenizer.enable_thinking == "true"
    assert options.training.train_iters is None
    assert accepted(options) == ["--use-flash-attn"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {lerning_rate: 1}", "unknown option a.lerning_rate in "),
        ("a: {lr: 1}\nb: {lr: 2}", "b.lr in "),
        ("lr: [1, 2]", "lr in "),
        ("lr: fast", "expects a number, got 'fast'"),
        ("- lr", "expected option names and values"),
        ("lr: [", "is not valid YAML"),
        ("qlora: true", "not accepted"),
    ],
)
def test_a_wrong_yaml_job_is_refused_like_a_wrong_command_line(tmp_path, text: str, said: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    message = refusal("--config", str(job))
    assert said in message
    assert "job.yaml" in message


def test_the_environment_gives_the_device_unless_the_command_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "cuda")
    assert posttrain().device.device == "cuda"
    assert posttrain("--device", "cpu").device.device == "cpu"
    assert "device" not in given(posttrain())
    monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "gpu")
    assert "environment variable MINDSPEED_LLM_DEVICE" in refusal()


@pytest.mark.parametrize("program", [PosttrainOptions, InferenceOptions, EvaluateOptions])
def test_recorded_options_are_json_and_start_the_same_run_again(tmp_path, program: type[Program]) -> None:
    words = ["--seq-length", "77", "--seed", "3", "--spec", "a", "b", "--bf16", "--lora-alpha", "9"]
    options = parse(program, words, "script.py")
    record = tmp_path / "args.json"
    record.write_text(to_json(options))
    assert json.loads(record.read_text()) == to_dict(options)
    assert parse(program, ["--config", str(record)], "script.py") == options


@pytest.mark.parametrize("script", sorted(PROGRAMS))
def test_help_explains_every_option_with_an_example_and_exits_zero(script: str, capsys) -> None:
    program = PROGRAMS[script]
    with pytest.raises(SystemExit) as stopped:
        parse(program, ["--help"], script)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in flags_of(program):
        assert f"  {flag.spelling}" in text
        assert flag.help.split()[0] in text
    assert "example:" in text
    assert max(map(len, text.split("example:")[0].splitlines())) <= 110 + len(max(text.split(), key=len))


@pytest.mark.parametrize("script", sorted(PROGRAMS))
def test_the_example_in_the_help_is_a_command_that_parses(script: str) -> None:
    program = PROGRAMS[script]
    words = shlex.split(program.EXAMPLE.replace("\\\n", " "))
    assert script in words
    parse(program, words[words.index(script) + 1 :], script)
