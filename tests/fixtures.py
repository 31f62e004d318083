"""A tiny model, tokenizer and data set, made alike every time, and the programs run on them as users run them.

No two sizes of the model are alike and its vocabulary is odd. Everything is made once per test session, in a folder
that disappears with it.
"""

import atexit
import contextlib
import functools
import inspect
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.pool import pool

VOCABULARY = 331  # rows of the embedding; the tokenizer has fewer
MAIN = {
    "preprocess_data.py": "mindspeed_llm.data.preprocess",
    "posttrain_gpt.py": "mindspeed_llm.training.posttrain",
    "inference.py": "mindspeed_llm.inference.main",
    "evaluation.py": "mindspeed_llm.evaluation.main",
    "convert_ckpt.py": "mindspeed_llm.checkpoint.convert",
}
ENGLISH = [
    "the",
    "cat",
    "counts",
    "red",
    "boats",
    "on",
    "a",
    "long",
    "river",
    "and",
    "sings",
    "of",
    "nine",
    "old",
    "stones",
]
CHINESE = ["我们在河边数石头", "唱歌", "。"]
WORDS = ENGLISH + CHINESE
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended on one rank: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def _in_haste(pictures: bool) -> Iterator[None]:
    """A program as it is, without two things that take longer than a tiny run and that hardly a test looks at.

    These are the curves as PNG, and the wait of the other ranks for rank 0 to be the first to say what is wrong.
    """
    from mindspeed_llm import cli
    from mindspeed_llm.training import charts

    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch.object(cli, "GRACE_SECONDS", 0.0))
        if not pictures:
            changed.enter_context(mock.patch.object(charts, "draw_all", lambda *_: []))
        yield


def run_on_rank(
    rank: int,
    script: str,
    argv: Sequence[str],
    cwd: str,
    stdin: str = "",
    around: Callable[[], Any] | None = None,
    pictures: bool = False,
) -> Outcome:
    """Pool task: run a script's `main` as the script does, exit status and error line included.

    The process group outlives the program, so that the next one can use it; megatron-core's groups do not.

    Args:
        around: makes a context manager entered around the program, e.g. to plant a fault; a module-level function.
        pictures: draw the curves of a training run.
    """
    from megatron.core import parallel_state

    from mindspeed_llm.cli import run
    from mindspeed_llm.models import parallel

    def leave() -> None:
        if parallel_state.model_parallel_is_initialized():
            parallel.stop()

    out, err = io.StringIO(), io.StringIO()
    kept = sys.argv, sys.stdin, parallel.disconnect, Path.cwd()
    status = 0
    try:
        sys.argv, sys.stdin, parallel.disconnect = [script, *argv], io.StringIO(stdin), leave
        os.chdir(cwd)
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with streams[0], streams[1], _in_haste(pictures), (around or contextlib.nullcontext)():
            run(import_module(MAIN[script]).main)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv, sys.stdin, parallel.disconnect = kept[:3]
        os.chdir(kept[3])
        leave()
    return Outcome(status, out.getvalue(), err.getvalue())


def launch(
    size: int,
    script: str,
    argv: Sequence[Any],
    cwd: Path | None = None,
    stdin: str = "",
    around: Callable[[], Any] | None = None,
    pictures: bool = False,
) -> list[Outcome]:
    """Run a program on `size` processes that stay for the next one; -> how it ended, by rank."""
    words, place = [str(word) for word in argv], str(cwd or scratch())
    more = {"stdin": stdin, "around": around, "pictures": pictures}
    return pool(size).run(run_on_rank, script=script, argv=words, cwd=place, **more)


def done(outcomes: Sequence[Outcome]) -> Outcome:
    """All ranks ended well; -> their output put together."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 0, f"rank {rank} exited {outcome.status}\n{outcome.out}\n{outcome.err}"
    return Outcome(0, "".join(o.out for o in outcomes), "".join(o.err for o in outcomes))


def refused(outcomes: Sequence[Outcome], status: int, *patterns: str) -> str:
    """Every rank ended with `status` and one line of error; -> rank 0's line, which holds all `patterns`."""
    for outcome in outcomes:
        assert outcome.status == status, f"exited {outcome.status}\n{outcome.out}\n{outcome.err}"
    errors = [line for line in outcomes[0].err.splitlines() if " error: " in line]
    assert len(errors) == 1 and "Traceback" not in outcomes[0].err, outcomes[0].err
    for pattern in patterns:
        assert re.search(pattern, errors[0]), f"{pattern!r} is not in {errors[0]!r}"
    return errors[0]


def once(make: Callable[..., Path]) -> Callable[..., Path]:
    """Make a thing once per set of arguments, however they are given."""
    signature, made = inspect.signature(make), {}

    @functools.wraps(make)
    def cached(*args: Any, **kwargs: Any) -> Path:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        key = tuple(bound.arguments.values())
        if key not in made:
            made[key] = make(*key)
        return made[key]

    return cached


@functools.cache
def scratch() -> Path:
    """A folder for this test session."""
    folder = Path(tempfile.mkdtemp(prefix="mindspeed_llm_tests_"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def sentence(seed: int, words: int) -> str:
    """`words` words of the tiny language, decided by `seed`."""
    state, chosen = seed * 7919 + 17, []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % 2**31
        chosen.append(WORDS[(state >> 16) % len(WORDS)])
    return " ".join(chosen)


def write_tokenizer(folder: Path, corpus_seed: int = 0) -> None:
    """A byte-level BPE tokenizer with Qwen3's control tokens; another seed gives other merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=318, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([sentence(corpus_seed + n, 30)[n % 7 :] for n in range(40)], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))


def make_hf(folder: Path, tied: bool = False, dtype: str = "float32", seed: int = 0) -> Path:
    """A Qwen3 folder of transformers' own making: 4 layers, 6 heads of 10 in 2 groups, hidden 24, ffn 44."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_theta=5000.0,
        eos_token_id=320,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values * 0.2 + ("norm" in name)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@once
def hf_model(tied: bool = False, dtype: str = "float32", seed: int = 0) -> Path:
    """The tiny model's HF folder."""
    return make_hf(scratch() / f"hf_{'tied' if tied else 'untied'}_{dtype}_{seed}", tied, dtype, seed)


@once
def data(rows: int = 29, longest: int = 24, template: str = "qwen3", extra: tuple[str, ...] = ()) -> Path:
    """A prefix of preprocessed rows of unequal length."""
    prefix = scratch() / "data" / f"rows_{rows}_{longest}_{template}{''.join(extra).replace('--', '_')}"
    prefix.parent.mkdir(exist_ok=True)
    source = prefix.with_suffix(".jsonl")
    with source.open("w", encoding="utf-8") as file:
        for n in range(rows):
            row = {"instruction": sentence(n, 2 + n % 5), "input": "", "output": sentence(n + 100, 1 + n * 7 % longest)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    argv = ["--input", source, "--output-prefix", prefix, "--tokenizer-name-or-path", hf_model()]
    argv += ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", template, "--workers", "1", *extra]
    done(launch(1, "preprocess_data.py", argv))
    return prefix


TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LORA = ("--lora-r", 3, "--lora-alpha", 6, "--lora-target-modules", *TARGETS)


def training(save: Path, *more: Any, lora: bool = True, steps: int | None = 6) -> list[Any]:
    """A command line of posttrain_gpt.py on the tiny model and data: fp32, 2 x 2 rows a step, warm-up and cosine.

    `more` comes last; a flag in it replaces a default, and one followed by None is left out.
    """
    words: list[Any] = ["--stage", "sft", "--save", save, "--log-dir", save.parent / f"{save.name}_logs"]
    defaults = {
        "--load": hf_model(),
        "--data-path": data(),
        "--seq-length": 64,
        "--micro-batch-size": 2,
        "--global-batch-size": 4,
        "--lr": 0.02,
        "--min-lr": 0.001,
        "--lr-warmup-iters": 2,
    }
    for flag, value in defaults.items():
        if flag not in more:
            words += [flag, value]
    if steps is not None:
        words += ["--train-iters", steps]
    words += ["--no-pad-to-seq-lengths", *(LORA if lora else ()), *more]
    left_out = {n for n, word in enumerate(words) if word is None}
    return [word for n, word in enumerate(words) if not {n, n + 1} & left_out]


@once
def tuned(size: int = 1, layout: tuple[Any, ...] = (), dtype: str = "float32") -> Path:
    """A LoRA run of 12 steps on the tiny model: far enough that it answers otherwise than its base."""
    save = scratch() / f"tuned_{size}_{'_'.join(map(str, layout)).replace('-', '')}_{dtype}"
    more = ("--load", hf_model(dtype=dtype), *(("--bf16",) if dtype == "bfloat16" else ()))
    done(launch(size, "posttrain_gpt.py", training(save, *more, *layout, steps=12)))
    return save


@once
def exported(size: int = 1, layout: tuple[Any, ...] = (), dtype: str = "float32") -> Path:
    """`tuned` merged into its base and exported as an HF folder by convert_ckpt.py."""
    adapter = tuned(size, layout, dtype)
    folder = adapter.with_name(f"{adapter.name}_export")
    base = mcore_model(1, 1, dtype)
    argv = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", base, "--lora-load", adapter]
    done(launch(1, "convert_ckpt.py", [*argv, "--save-dir", folder]))
    return next(path.parent for path in folder.rglob("config.json"))


@once
def mcore_model(tensor: int, pipeline: int, dtype: str = "float32") -> Path:
    """The tiny model as a Megatron checkpoint of a layout."""
    folder = scratch() / f"mcore_{tensor}_{pipeline}_{dtype}"
    argv = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", hf_model(dtype=dtype)]
    argv += ["--target-tensor-parallel-size", tensor, "--target-pipeline-parallel-size", pipeline]
    done(launch(1, "convert_ckpt.py", [*argv, "--save-dir", folder]))
    return folder


def records(save: Path) -> list[dict[str, Any]]:
    """The steps in the history beside a run made with `training`."""
    text = (save.parent / f"{save.name}_logs" / save.name / "logging.jsonl").read_text()
    return [one for one in map(json.loads, text.splitlines()) if "loss" in one]


def losses(save: Path) -> list[float]:
    """Losses of every step, at full precision."""
    return [record["loss"] for record in records(save)]


def weights(folder: Path) -> dict[str, Any]:
    """Everything tensor-like in a training checkpoint, unsharded, by section and logical name."""
    from mindspeed_llm.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(folder)
    sources = {"lora": checkpoint.lora()} if checkpoint.lora_names else {"base": checkpoint.base()}
    if checkpoint.first.get("optimizer"):
        sources |= {field: checkpoint.section("optimizer", field) for field in ("master", "exp_avg", "exp_avg_sq")}
    return {f"{kind}/{name}": source.read(name) for kind, source in sources.items() for name in source.names()}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two results of `weights` are equal bit for bit."""
    import torch

    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:5]


def close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Two results of `weights` agree to `tolerance` times the largest value of each tensor."""
    assert one.keys() == other.keys()
    worst = {n: float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp_min(1e-12)) for n in one}
    wrong = {name: error for name, error in worst.items() if not error <= tolerance}
    assert not wrong, sorted(wrong.items(), key=lambda item: -item[1])[:5]
