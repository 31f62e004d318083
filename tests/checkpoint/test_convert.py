"""`convert_ckpt.py` as users run it: workflows, output rules, refusals, exit codes, kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings, read_metadata
from mindspeed_llm.checkpoint.open import open_lora
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.tiny import TARGETS, make_hf, random_adapter, write_adapter
from tests.conftest import REPO

SETTINGS = LoraSettings(3, 7.0, TARGETS)


def convert(source: str, target: str, load: Path, save: Path, *more: object) -> None:
    """One conversion in this process."""
    words = ["--load-model-type", source, "--save-model-type", target, "--load-dir", load, "--save-dir", save, *more]
    assert main([str(word) for word in words]) == 0


def split(tp: int, pp: int, chunk: int | None = None) -> list[object]:
    """Flags of a target layout."""
    flags: list[object] = ["--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp]
    return flags + (["--num-layers-per-virtual-pipeline-stage", chunk] if chunk else [])


def logits(folder: Path) -> torch.Tensor:
    """Of transformers, in float32, on fixed tokens; no tensor may be missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model(torch.arange(1, 33).view(2, 16)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [(1, 1), (2, 2, 1)])
def test_a_round_trip_gives_transformers_the_same_model(layout: tuple, tied: bool, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", tied)
    convert("hf", "mg", hf, tmp_path / "mg", *split(*layout), "--params-dtype", "bf16")
    convert("mg", "hf", tmp_path / "mg", tmp_path / "back")
    original, back = load_file(hf / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)
    assert torch.equal(logits(tmp_path / "back"), logits(hf))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_the_checkpoint_records_model_layout_base_and_hash(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert("hf", "mg", hf, tmp_path / "mg", *split(2, 2))
    found = read_metadata(tmp_path / "mg" / "iter_0000001")
    expected = content_hash(HFSource(hf))
    assert found.content_hash == expected and found.base == BaseRecord(str(hf), expected)
    assert found.layout == Layout.even(4, 2, 2) and found.model.hf_config == json.loads(
        (hf / "config.json").read_text()
    )
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "1"
    convert("mg", "mg", tmp_path / "mg", tmp_path / "mg2", *split(1, 4))
    again = read_metadata(tmp_path / "mg2" / "iter_0000001")
    assert (again.content_hash, again.base) == (expected, found.base)


def test_padding_of_the_vocabulary_is_removed_on_the_way_back(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert("hf", "mg", hf, tmp_path / "mg", *split(2, 1), "--make-vocab-size-divisible-by", 16)
    checkpoint = MegatronCheckpoint(tmp_path / "mg")
    assert checkpoint.padded_rows == 64 and vars(checkpoint.first["args"])["padded_vocab_size"] == 64
    convert("mg", "hf", tmp_path / "mg", tmp_path / "back")
    assert content_hash(HFSource(tmp_path / "back")) == content_hash(HFSource(hf))


def trained(tmp_path: Path, **fields: object) -> tuple[Path, Path]:
    """A base as Megatron checkpoint (TP2 PP2) and an adapter trained on it at TP1 PP4."""
    hf = make_hf(tmp_path / "hf")
    convert("hf", "mg", hf, tmp_path / "mg", *split(2, 2))
    source = HFSource(hf)
    record = BaseRecord(str(hf), content_hash(source))
    factors = random_adapter(source.table)
    write_adapter(tmp_path / "lora", source.table, factors, Layout.even(4, 1, 4), SETTINGS, base=record, **fields)
    return tmp_path / "mg", tmp_path / "lora"


def test_a_merge_into_hf_needs_no_settings_and_goes_beside_the_original(tmp_path: Path) -> None:
    base, lora = trained(tmp_path)
    hf = tmp_path / "hf"
    convert("mg", "hf", base, hf, "--lora-load", lora)
    expected = MergedSource(HFSource(hf), open_lora(lora))
    assert content_hash(HFSource(hf / "mg2hg")) == content_hash(expected)
    assert (hf / "mg2hf").resolve() == (hf / "mg2hg").resolve()
    assert (hf / "mg2hg" / "chat_template.jinja").is_file()
    assert not torch.equal(logits(hf / "mg2hg"), logits(hf))


def test_the_merged_export_computes_what_peft_computes_with_the_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    hf = make_hf(tmp_path / "hf", dtype="float32")
    source = HFSource(hf)
    factors = random_adapter(source.table)
    write_adapter(tmp_path / "lora", source.table, factors, Layout.even(4, 2, 2), SETTINGS)
    convert("hf", "hf", hf, tmp_path / "out", "--lora-load", tmp_path / "lora")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    parameters = dict(model.named_parameters())
    for name in factors:
        if ".lora_A." not in name:
            continue
        module = name.replace(".lora_A.weight", "")
        entry = source.table.entry(f"{module}.weight")
        for part, projection in enumerate(hf.name for hf in entry.hf):
            rows = torch.cat([torch.arange(*one) for one in entry.hf_map().part_ranges(part)])
            target = "base_model.model." + projection.removesuffix(".weight")
            parameters[f"{target}.lora_A.default.weight"].data.copy_(factors[f"{module}.lora_A.weight"])
            parameters[f"{target}.lora_B.default.weight"].data.copy_(factors[f"{module}.lora_B.weight"][rows])
    with torch.no_grad():
        expected = model(torch.arange(1, 33).view(2, 16)).logits
    found = logits(tmp_path / "out")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(hf)).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("route", ["mg to mg to hf", "hf base"])
def test_merging_by_any_route_gives_the_same_weights(route: str, tmp_path: Path) -> None:
    base, lora = trained(tmp_path)
    convert("mg", "hf", base, tmp_path / "direct", "--lora-load", lora)
    if route == "hf base":
        convert("hf", "hf", tmp_path / "hf", tmp_path / "other", "--lora-load", lora)
    else:
        convert("mg", "mg", base, tmp_path / "merged", "--lora-load", lora, *split(2, 2, 1))
        convert("mg", "hf", tmp_path / "merged", tmp_path / "other")
        found = read_metadata(tmp_path / "merged" / "iter_0000001")
        assert found.lora is None and found.content_hash == content_hash(HFSource(tmp_path / "other"))
    assert content_hash(HFSource(tmp_path / "other")) == content_hash(HFSource(tmp_path / "direct"))


def test_an_adapter_saved_with_its_base_is_merged_from_the_one_folder(golden: Path, tmp_path: Path) -> None:
    unified = golden / "cases" / "B_lora_unified_qwen3_tp2pp2" / "mg_lora"
    with pytest.raises(InputError, match="--lora-alpha"):
        convert("mg", "hf", unified, tmp_path / "out", "--hf-cfg-dir", golden / "_hf" / "qwen3_tied")
    convert("mg", "hf", unified, tmp_path / "out", "--hf-cfg-dir", golden / "_hf" / "qwen3_tied", "--lora-alpha", 16)
    assert content_hash(HFSource(tmp_path / "out")) != content_hash(MegatronCheckpoint(unified).base())


def test_another_base_or_other_settings_than_the_adapter_records_are_refused(tmp_path: Path) -> None:
    base, lora = trained(tmp_path)
    other = make_hf(tmp_path / "other", seed=8)
    with pytest.raises(InputError, match="give that base"):
        convert("hf", "hf", other, tmp_path / "out", "--lora-load", lora)
    with pytest.raises(UsageError, match="--lora-alpha says 32, the adapter says 7"):
        convert("mg", "hf", base, tmp_path / "out", "--lora-load", lora, "--lora-alpha", 32)
    with pytest.raises(InputError, match="holds no LoRA weights"):
        convert("mg", "hf", base, tmp_path / "out", "--lora-load", base)
    with pytest.raises(UsageError, match="need --lora-load"):
        convert("mg", "hf", base, tmp_path / "out", "--lora-r", 8)
    assert not (tmp_path / "out").exists()


def test_an_existing_result_needs_overwrite(tmp_path: Path) -> None:
    hf, mg, out = make_hf(tmp_path / "hf"), tmp_path / "mg", tmp_path / "out"
    convert("hf", "mg", hf, mg)
    with pytest.raises(UsageError, match="--overwrite"):
        convert("hf", "mg", hf, mg, *split(2, 1))
    assert MegatronCheckpoint(mg).layout.tp == 1
    convert("hf", "mg", hf, mg, *split(2, 1), "--overwrite")
    assert MegatronCheckpoint(mg).layout.tp == 2
    convert("mg", "hf", mg, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        convert("mg", "hf", mg, out)
    convert("mg", "hf", mg, out, "--overwrite", "--params-dtype", "fp32")
    assert HFSource(out).config.dtype == "float32" and (out / "notes.txt").read_text() == "mine"
    convert("mg", "hf", mg, hf)
    with pytest.raises(UsageError, match="mg2hg: a result is there already"):
        convert("mg", "hf", mg, hf)
    assert content_hash(HFSource(hf)) == content_hash(HFSource(hf / "mg2hg"))


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_params_dtype_casts_once_and_the_config_says_so(flag: str, dtype: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", dtype="float32")
    convert("hf", "mg", hf, tmp_path / "mg", "--params-dtype", flag, *split(2, 1))
    convert("mg", "hf", tmp_path / "mg", tmp_path / "back")
    original, back = load_file(hf / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(original[name].to(getattr(torch, dtype)), back[name]) for name in original)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_lost_base_folder_needs_hf_cfg_dir_of_the_same_model(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert("hf", "mg", hf, tmp_path / "mg")
    hf.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--hf-cfg-dir"):
        convert("mg", "hf", tmp_path / "mg", tmp_path / "out")
    with pytest.raises(InputError, match="num_layers 2 and 4"):
        convert("mg", "hf", tmp_path / "mg", tmp_path / "out", "--hf-cfg-dir", make_hf(tmp_path / "two", layers=2))
    convert("mg", "hf", tmp_path / "mg", tmp_path / "out", "--hf-cfg-dir", tmp_path / "moved")
    assert content_hash(HFSource(tmp_path / "out")) == content_hash(HFSource(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-tensor-parallel-size", "4"], "num_query_groups 2 is not divisible by tensor parallel size 4"),
        (["--target-pipeline-parallel-size", "3"], "4 layers are not divisible by pipeline parallel size 3"),
        (["--num-layers-per-virtual-pipeline-stage", "1"], "need a pipeline parallel size above 1"),
        (["--target-expert-parallel-size", "2"], "the model has no experts"),
        (["--add-qkv-bias"], "--add-qkv-bias says True, the model says False"),
        (["--spec", "mindspeed_llm.tasks.models.spec.llama_spec", "layer_spec"], "--spec says"),
    ],
)
def test_contradictions_are_usage_errors_and_leave_nothing(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        convert("hf", "mg", make_hf(tmp_path / "hf"), tmp_path / "mg", *more)
    assert not (tmp_path / "mg").exists()


def test_naming_the_wrong_format_says_which_one_it_is(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert("hf", "mg", hf, tmp_path / "mg")
    with pytest.raises(UsageError, match="is an HF folder; give --load-model-type hf"):
        convert("mg", "mg", hf, tmp_path / "out")
    with pytest.raises(UsageError, match="is a Megatron checkpoint; give --load-model-type mg"):
        convert("hf", "mg", tmp_path / "mg", tmp_path / "out")
    with pytest.raises(UsageError, match="choose another folder"):
        convert("mg", "mg", tmp_path / "mg", tmp_path / "mg", *split(2, 1))


def script(*words: object) -> subprocess.CompletedProcess:
    """The script in its own process."""
    command = [sys.executable, REPO / "convert_ckpt.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)


def test_the_upstream_command_line_runs_and_says_what_comes_next(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    done = script(
        "--use-mcore-models", "--model-type", "GPT", "--load-model-type", "hf", "--save-model-type", "mg",
        "--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 2, "--load-dir", hf,
        "--save-dir", tmp_path / "mg", "--tokenizer-model", hf / "tokenizer.json", "--model-type-hf", "qwen3",
        "--spec", "mindspeed_llm.tasks.models.spec.qwen3_spec", "layer_spec", "--params-dtype", "bf16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "converted qwen3 (4 layers, bfloat16): hf -> mg TP1 PP2" in done.stdout
    assert (
        f"next: torchrun --nproc_per_node 2 posttrain_gpt.py --stage sft --finetune --load {tmp_path / 'mg'}"
        in done.stdout
    )


def test_exit_codes_and_one_line_errors(tmp_path: Path) -> None:
    flags = ["--load-model-type", "hf", "--save-model-type", "mg", "--save-dir", tmp_path / "mg"]
    unknown = script(*flags, "--load-dir", tmp_path, "--target-tensor-paralel-size", 2)
    assert unknown.returncode == 2 and "target-tensor-parallel-size" in unknown.stderr
    missing = script(*flags, "--load-dir", tmp_path / "none")
    assert (
        missing.returncode == 1 and len(missing.stderr.strip().splitlines()) == 1 and "Traceback" not in missing.stderr
    )
    assert not (tmp_path / "mg").exists()


def test_converting_needs_neither_megatron_nor_transformers(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    code = (
        "import sys; from mindspeed_llm.checkpoint.convert import main;"
        f"main('--load-model-type hf --save-model-type mg --load-dir {hf} --save-dir {tmp_path}/mg'.split());"
        f"main('--load-model-type mg --save-model-type hf --load-dir {tmp_path}/mg --save-dir {tmp_path}/out'.split());"
        "print([name for name in ('megatron', 'transformers', 'peft', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr


KILLED = """
import sys, time
from mindspeed_llm.checkpoint.formats import blocks
write, count = blocks.write_values, 0
def slow(*arguments):
    global count
    count += 1
    if count == 20:
        print("midway", flush=True)
        time.sleep(60)
    write(*arguments)
blocks.write_values = slow
from mindspeed_llm.checkpoint.convert import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("target", ["mg", "hf"])
def test_a_kill_in_the_middle_leaves_nothing_visible_and_the_next_run_succeeds(target: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert("hf", "mg", hf, tmp_path / "mg")
    words = ["--load-model-type", "mg", "--save-model-type", target, "--load-dir", tmp_path / "mg"]
    words += ["--save-dir", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, words)], stdout=subprocess.PIPE, cwd=REPO)
    assert process.stdout.readline() == b"midway\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    visible = [
        path for path in (tmp_path / "out").rglob("*") if not str(path.relative_to(tmp_path / "out")).startswith(".")
    ]
    assert not visible
    convert("mg", target, tmp_path / "mg", tmp_path / "out")
    assert not [path for path in (*tmp_path.iterdir(), *(tmp_path / "out").iterdir()) if path.name.startswith(".")]


def test_a_full_disk_is_an_input_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from mindspeed_llm.checkpoint.formats import blocks

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hf = make_hf(tmp_path / "hf")
    monkeypatch.setattr(blocks, "write_values", full)
    with pytest.raises(InputError, match="No space left"):
        convert("hf", "mg", hf, tmp_path / "mg")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
