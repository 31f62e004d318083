"""What a training checkpoint holds and says about itself, and that other programs read it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.metadata import read_metadata
from mindspeed_llm.checkpoint.open import open_base, source_hash
from tests.fixtures import (
    VOCABULARY,
    close,
    data,
    done,
    exported,
    hf_model,
    launch,
    losses,
    mcore_model,
    same,
    training,
    tuned,
    weights,
)

TP2_PP2 = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.pt"))


def test_a_lora_checkpoint_holds_the_adapter_and_its_optimizer_state_by_parameter_name_and_nothing_else() -> None:
    checkpoint = MegatronCheckpoint(tuned())
    targets = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    adapter = {f"decoder.layers.{n}.{t}.lora_{f}.weight" for n in range(4) for t in targets for f in "AB"}
    assert set(checkpoint.lora_names) == set(checkpoint.tensors) == adapter
    for field in ("master", "exp_avg", "exp_avg_sq"):
        assert set(checkpoint.section("optimizer", field).names()) == adapter
    assert checkpoint.first["optimizer"]["step"] == 12 and checkpoint.first["iteration"] == 12
    assert set(checkpoint.first) == {
        "args", "checkpoint_version", "iteration", "consumed_train_samples", "skipped_iterations", "nan_iterations",
        "validation", "model", "optimizer", "rng_state",
    }  # fmt: skip
    lora = checkpoint.lora()
    assert all(torch.equal(lora.read(n), checkpoint.section("optimizer", "master").read(n)) for n in lora.names())


def test_without_the_filter_the_untouched_base_lies_beside_the_adapter(tmp_path: Path) -> None:
    done(launch(1, "posttrain_gpt.py", training(tmp_path / "whole", "--lora-ckpt-filter", "false", steps=12)))
    checkpoint, base = MegatronCheckpoint(tmp_path / "whole"), open_base(hf_model())
    assert not checkpoint.missing_base
    assert all(torch.equal(checkpoint.base().read(name), base.read(name)) for name in base.names())
    same(weights(tmp_path / "whole"), weights(tuned()))
    again = training(tmp_path / "more", "--load", tmp_path / "whole", "--lora-load", tmp_path / "whole", steps=14)
    assert "resumed at step 12" in done(launch(1, "posttrain_gpt.py", again)).out


def test_the_record_names_adapter_base_template_layout_and_every_option() -> None:
    said = read_metadata(tuned() / "iter_0000012")
    assert said is not None and said.lora is not None and said.base is not None
    assert (said.lora.r, said.lora.alpha, said.iteration, str(said.layout)) == (3, 6, 12, "TP1 PP1")
    assert set(said.lora.target_modules) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert said.base.path == str(hf_model().resolve()) and said.base.hash == source_hash(open_base(hf_model()))
    assert (said.template, said.enable_thinking) == ("qwen3", "none")
    assert said.model.vocab_size == VOCABULARY
    options = json.loads((tuned() / "iter_0000012" / "args.json").read_text())["options"]
    flat = json.dumps(options)
    assert "micro_batch_size" in flat and "lr_warmup_iters" in flat


@pytest.mark.distributed
def test_adapter_and_optimizer_are_the_same_tensors_whatever_the_layout_that_wrote_them() -> None:
    checkpoint = MegatronCheckpoint(tuned(4, TP2_PP2))
    assert str(checkpoint.layout) == "TP2 PP2"
    close(weights(tuned(4, TP2_PP2)), weights(tuned()), 1e-4)
    stored = checkpoint.files[1, 1, 0]["model"]
    name = "decoder.layers.0.mlp.linear_fc1.lora_B.default.weight"
    assert stored[name].shape == (44, 3), "a rank's file holds its share only: (ffn 44 / TP2, both halves) x rank 3"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout", "dtype"), [(1, (), "float32"), (4, TP2_PP2, "float32"), (1, (), "bfloat16")]
)
def test_the_merged_export_is_base_plus_scaled_b_a_rounded_once(size: int, layout: tuple, dtype: str) -> None:
    from safetensors.torch import load_file

    base = load_file(hf_model(dtype=dtype) / "model.safetensors")
    lora = MegatronCheckpoint(tuned(size, layout, dtype)).lora()
    merged: dict[str, Any] = {}
    for path in exported(size, layout, dtype).glob("*.safetensors"):
        merged |= load_file(path)
    assert merged.keys() == base.keys()
    for layer in range(4):
        a, b = (lora.read(f"decoder.layers.{layer}.mlp.linear_fc1.lora_{f}.weight").float() for f in "AB")
        delta = (6 / 3) * (b @ a)
        for part, name in enumerate(("gate_proj", "up_proj")):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            wanted = (base[key].float() + delta.chunk(2)[part]).to(base[key].dtype)
            assert torch.allclose(merged[key].float(), wanted.float(), rtol=1e-6 if dtype == "float32" else 8e-3)
            assert not torch.equal(merged[key], base[key])
    untouched = [key for key in base if not key.endswith("_proj.weight")]
    assert untouched and all(torch.equal(merged[key], base[key]) for key in untouched)


def test_the_first_loss_is_that_of_transformers_on_the_rows_the_sampler_names(tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    from mindspeed_llm.data.batch import collate
    from mindspeed_llm.data.dataset import IndexedDataset
    from mindspeed_llm.data.sampler import EpochSampler

    done(launch(1, "posttrain_gpt.py", training(tmp_path / "run", steps=3)))
    rows = IndexedDataset(data())
    model = Qwen3ForCausalLM.from_pretrained(hf_model()).float()
    means = []
    for numbers in EpochSampler(len(rows), 2, 0, 1, 2, 1234).batch(0):
        batch = collate([rows[n] for n in numbers], 0, 64, 8, pad_to_longest=True)
        with torch.no_grad():
            logits = model(torch.as_tensor(batch["tokens"])).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.as_tensor(batch["labels"]).flatten())
        means.append(float(loss))
    assert losses(tmp_path / "run")[0] == pytest.approx(np.mean(means), rel=1e-5)


def test_full_tuning_writes_a_model_that_transformers_loads_after_conversion(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save = tmp_path / "full"
    done(launch(1, "posttrain_gpt.py", training(save, "--lr", 0.002, lora=False)))
    argv = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", save, "--save-dir", tmp_path / "hf"]
    done(launch(1, "convert_ckpt.py", argv))
    tensors = load_file(next((tmp_path / "hf").rglob("model.safetensors")))
    trained = MegatronCheckpoint(save).base()
    assert torch.equal(tensors["model.norm.weight"], trained.read("decoder.final_layernorm.weight"))
    base = load_file(hf_model() / "model.safetensors")
    assert tensors.keys() == base.keys() and all(not torch.equal(tensors[k], base[k]) for k in base)


def test_saved_files_are_private_to_their_group_and_nothing_else_is_left() -> None:
    run = tuned()
    assert sorted(p.name for p in run.iterdir()) == ["iter_0000012", "latest_checkpointed_iteration.txt"]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) == 3 and all(path.stat().st_mode & 0o777 == 0o640 for path in files)
    assert tree_bytes(run) < tree_bytes(mcore_model(1, 1)) * 2
