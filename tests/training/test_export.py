"""`--save-safetensors` writes what the converter would write, at every layout, and transformers and peft read it."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import done, hf_model, launch, mcore_model, refused, sentence, training
from tests.training import export_faults
from tests.training.test_resume import killed

TP_PP = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
VPP = ("--num-layers-per-virtual-pipeline-stage", 1, "--micro-batch-size", 1)
OVERLAP = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--micro-batch-size", 1)
SAVE = ("--save-safetensors", "--max-shard-size", "20KB")
LAYOUTS = {
    "one process": (1, ()),
    "TP2 PP2 with sequence parallelism": (4, (*TP_PP, "--sequence-parallel")),
    "TP2 PP2 VPP2": (4, (*TP_PP, *VPP)),
    "DP2 that gathers parameters late": (2, OVERLAP),
    "TP2 DP2": (4, ("--tensor-model-parallel-size", 2, "--use-distributed-optimizer")),
}


def run(size: int, *argv: object, **more: Any) -> str:
    return done(launch(size, "posttrain_gpt.py", argv, **more)).out


def converted(save: Path, *more: object) -> Path:
    """What convert_ckpt.py makes of a run's newest checkpoint."""
    folder = save.with_name(f"{save.name}_converted")
    argv = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", save, "--save-dir", folder, *more]
    done(launch(1, "convert_ckpt.py", argv))
    return folder


def with_adapter(save: Path, *more: object) -> Path:
    """What convert_ckpt.py makes of the base and a run's adapter: merged unless `more` says otherwise."""
    folder = save.with_name(f"{save.name}_{len(more)}")
    argv = ["--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", hf_model(), "--lora-load", save]
    done(launch(1, "convert_ckpt.py", [*argv, "--save-dir", folder, *more]))
    return folder


def same_files(one: Path, other: Path) -> None:
    """Two folders hold the same files, byte for byte."""
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def loaded(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it, in float32, nothing missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[(17 * place) % 300 for place in range(20)]])
    return model(ids).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() >= 0.5 and (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.std()))


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("tied", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_a_tuned_model_is_saved_as_the_converter_would_write_it(
    name: str, tied: bool, dtype: str, tmp_path: Path
) -> None:
    size, layout = LAYOUTS[name]
    base = hf_model(tied=tied, dtype=dtype)
    precision = ("--bf16",) if dtype == "bfloat16" else ()
    save = tmp_path / "run"
    more = (*layout, *precision, *SAVE, "--load", base, "--lr", 0.002)
    run(size, *training(save, *more, lora=False, steps=3))
    found = save / "iter_0000003" / "hf"
    assert len(list(found.glob("*.safetensors"))) > 2 and not (save / "iter_0000003" / "peft").exists()
    same_files(found, converted(save, "--max-shard-size", "20KB"))
    tuned, before = loaded(found), loaded(base)
    assert (logits(tuned) - logits(before)).abs().max() > 0.1
    assert json.loads((found / "config.json").read_text())["dtype"] == dtype


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one process", "TP2 PP2 VPP2", "TP2 DP2"])
def test_a_lora_run_is_saved_for_peft_as_the_converter_would_write_it(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    size, layout = LAYOUTS[name]
    save = tmp_path / "run"
    out = run(size, *training(save, *layout, *SAVE))
    found = save / "iter_0000006" / "peft"
    assert "PEFT adapter of rank 3" in out and not (save / "iter_0000006" / "hf").exists()
    same_files(found, with_adapter(save, "--save-lora-to-hf", "--merge-lora", "false"))
    adapted = PeftModel.from_pretrained(loaded(hf_model()), found)
    assert_close(logits(adapted), logits(loaded(with_adapter(save))))
    assert (logits(adapted) - logits(loaded(hf_model()))).abs().max() > 0.1


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["one process", "TP2 PP2 VPP2", "DP2 that gathers parameters late"])
def test_a_lora_run_that_saves_its_base_too_is_saved_merged(name: str, dtype: str, tmp_path: Path) -> None:
    from peft import PeftModel

    size, layout = LAYOUTS[name]
    save = tmp_path / "run"
    precision = ("--bf16",) if dtype == "bfloat16" else ()
    more = (*layout, *precision, *SAVE, "--load", hf_model(dtype=dtype), "--lora-ckpt-filter", "false")
    run(size, *training(save, *more))
    checkpoint = save / "iter_0000006"
    same_files(checkpoint / "hf", converted(save, "--max-shard-size", "20KB"))
    if dtype == "float32":
        adapted = PeftModel.from_pretrained(loaded(hf_model()), checkpoint / "peft")
        assert_close(logits(loaded(checkpoint / "hf")), logits(adapted))


def test_every_checkpoint_has_its_export_and_training_goes_on_from_it(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(1, *training(save, *SAVE, "--save-interval", 2, lora=False, steps=4))
    assert {path.parent.name for path in save.glob("iter_*/hf")} == {"iter_0000002", "iter_0000004"}
    again = ("--load", save / "iter_0000004" / "hf", "--save-safetensors")
    run(1, *training(tmp_path / "next", *again, lora=False, steps=3))
    out = done(launch(1, "inference.py", ["--load", tmp_path / "next/iter_0000003/hf", "--prompt", sentence(1, 3)]))
    assert out.out


EARLY = ("--save-interval", 2, "--lr", 0.002)
ASYNC_LAYOUTS = {
    "one process": (1, ()),
    "TP2 DP2": (4, ("--tensor-model-parallel-size", 2, "--use-distributed-optimizer", "--ckpt-format", "torch_dist")),
}


def in_the_background(size: int, save: Path, *more: object, around: Any = export_faults.written_behind_step_3) -> str:
    """A run whose first HF folder is written when training is one step further."""
    return run(size, *training(save, *more, *SAVE, *EARLY, "--async-save", steps=4, lora=False), around=around)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ASYNC_LAYOUTS)
def test_what_is_exported_in_the_background_is_the_step_it_was_asked_for(name: str, tmp_path: Path) -> None:
    size, layout = ASYNC_LAYOUTS[name]
    run(size, *training(tmp_path / "waiting", *layout, *SAVE, *EARLY, steps=4, lora=False))
    out = in_the_background(size, tmp_path / "run", *layout)
    if size == 1:  # several processes print for themselves
        assert out.index(" iteration        3/") < out.index("successfully saved checkpoint from iteration       2")
    for step in ("iter_0000002", "iter_0000004"):
        same_files(tmp_path / "run" / step / "hf", tmp_path / "waiting" / step / "hf")


def test_a_live_model_read_behind_training_is_noticed(tmp_path: Path) -> None:
    run(1, *training(tmp_path / "waiting", *SAVE, *EARLY, steps=4, lora=False))
    in_the_background(1, tmp_path / "run", around=export_faults.the_live_model_is_read_late)
    with pytest.raises(AssertionError):
        same_files(tmp_path / "run" / "iter_0000002" / "hf", tmp_path / "waiting" / "iter_0000002" / "hf")


@pytest.mark.distributed
def test_a_merged_model_is_exported_in_the_background_as_the_converter_would_write_it(tmp_path: Path) -> None:
    size, layout = LAYOUTS["TP2 PP2 VPP2"]
    save = tmp_path / "run"
    run(size, *training(save, *layout, *SAVE, "--async-save", "--lora-ckpt-filter", "false"))
    same_files(save / "iter_0000006" / "hf", converted(save, "--max-shard-size", "20KB"))


def test_a_run_from_a_megatron_checkpoint_takes_config_and_tokenizer_from_the_recorded_base(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(1, *training(save, *SAVE, "--load", mcore_model(2, 2), lora=False, steps=3))
    found = save / "iter_0000003" / "hf"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (hf_model() / name).read_bytes()
    loaded(found)


def test_a_base_whose_folder_is_gone_is_refused_before_training_unless_a_tokenizer_folder_stands_in(
    tmp_path: Path,
) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(hf_model(), lost)
    base = tmp_path / "mcore"
    argv = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", lost, "--save-dir", base]
    done(launch(1, "convert_ckpt.py", argv))
    shutil.rmtree(lost)
    argv = training(tmp_path / "run", *SAVE, "--load", base, lora=False, steps=3)
    refused(launch(1, "posttrain_gpt.py", argv), 2, "records no HF folder", "--tokenizer-name-or-path")
    run(1, *argv, "--tokenizer-name-or-path", hf_model())
    loaded(tmp_path / "run" / "iter_0000003" / "hf")


def test_a_size_that_is_none_is_refused_before_training(tmp_path: Path) -> None:
    argv = training(tmp_path / "run", "--save-safetensors", "--max-shard-size", "large", steps=3)
    refused(launch(1, "posttrain_gpt.py", argv), 2, "--max-shard-size large: not a size")


@pytest.mark.distributed
@pytest.mark.parametrize("background", [(), ("--async-save",)], ids=["waiting", "in-the-background"])
@pytest.mark.parametrize("around", [export_faults.killed_between_tensors, export_faults.killed_in_the_adapter])
def test_a_kill_in_the_middle_of_the_export_leaves_nothing_visible(
    around: Any, background: tuple[str, ...], tmp_path: Path
) -> None:
    save = tmp_path / "run"
    argv = training(save, *SAVE, "--save-interval", 2, "--lora-ckpt-filter", "false", *background)
    assert killed(argv, around) == -signal.SIGKILL
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000002"]
    assert {path.name for path in (save / "iter_0000002").iterdir()} == {"args.json", "hf", "peft", "mp_rank_00"}
    assert any((save / ".iter_0000004.partial" / "hf").iterdir()), "the kill came in the middle"
    run(1, *argv, "--auto-resume")
    loaded(save / "iter_0000006" / "hf")
    assert not list(save.glob(".*"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("around", "background"),
    [
        (export_faults.a_tensor_left_out, ()),
        (export_faults.a_tensor_written_twice, ()),
        (export_faults.a_tensor_left_out, ("--async-save",)),
    ],
)
def test_a_tensor_written_by_no_rank_or_by_two_is_noticed(
    around: Any, background: tuple[str, ...], tmp_path: Path
) -> None:
    argv = training(tmp_path / "run", *TP_PP, *SAVE, *background, lora=False, steps=3)
    refused(launch(4, "posttrain_gpt.py", argv, around=around), 1, r"tensors were written, the model has 47")
    assert not list((tmp_path / "run").glob("iter_*"))
