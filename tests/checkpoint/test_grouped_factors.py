"""LoRA factors in upstream's joined forms: experts that share tensors, and latent attention's one down projection."""

from collections import OrderedDict
from pathlib import Path

import torch

from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.torch_file import write_torch_file
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.open import adapter_of
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.families import hf_values, make_family

RANK, ALPHA = 3, 6.0


def adapter(name: str, folder: Path, factors: dict[str, torch.Tensor]) -> tuple[HFSource, MergedSource]:
    """The family's tiny base, and it merged with a checkpoint of one rank that holds `factors` by file key."""
    base = HFSource(make_family(name, folder / "hf"))
    path = folder / "lora" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    write_torch_file(path, {"args": None, "iteration": 1, "model": OrderedDict(factors)})
    lora = adapter_of(MegatronCheckpoint(folder / "lora", None, base.config), RANK, ALPHA)
    return base, MergedSource(base, lora, torch.float32)


def random(*shape: int) -> torch.Tensor:
    """Values that do not repeat."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_grouped_experts_factors_are_blocks_of_the_transposed_product(tmp_path: Path) -> None:
    config = ModelConfig.from_hf_dict(hf_values("qwen3_moe"), "here")
    experts, hidden, ffn = config.num_experts, config.hidden_size, config.moe_ffn_hidden_size
    factors = {}
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}.mlp.experts."
        factors |= {
            prefix + "weight1_lora_a": random(hidden, experts * RANK),
            prefix + "weight1_lora_b": random(RANK, experts * 2 * ffn),
            prefix + "weight2_lora_a": random(experts * ffn, RANK),
            prefix + "weight2_lora_b": random(experts * RANK, hidden),
        }
    base, merged = adapter("qwen3_moe", tmp_path, factors)
    prefix = "decoder.layers.2.mlp.experts."
    for number, rows, columns in ((1, hidden, 2 * ffn), (2, ffn, hidden)):
        a = factors[f"{prefix}weight{number}_lora_a"].reshape(experts, rows, RANK)
        b = factors[f"{prefix}weight{number}_lora_b"].reshape(experts, RANK, columns)
        for expert in range(experts):
            name = f"{prefix}local_experts.{expert}.linear_fc{number}.weight"
            expected = base.read(name).float() + ALPHA / RANK * (a[expert] @ b[expert]).t()
            torch.testing.assert_close(merged.read(name), expected)


def test_both_down_projections_share_the_joined_a_and_have_their_rows_of_b(tmp_path: Path) -> None:
    for name in ("deepseek_v3", "deepseek_v2"):
        table = WeightTable(ModelConfig.from_hf_dict({**hf_values(name), "num_nextn_predict_layers": 0}, "here"))
        sizes, attention = table.sizes, "decoder.layers.{}.self_attention."
        q = "linear_q_down_proj" if table.config.q_lora_rank else "linear_q_proj"
        q_rows = sizes["q_lora"] if table.config.q_lora_rank else sizes["q_up"]
        factors = {}
        for layer in range(table.config.num_layers):
            key = attention.format(layer) + "linear_qkv."
            factors[key + "lora_A.default.weight"] = random(RANK, sizes["hidden"])
            factors[key + "lora_B.default.weight"] = random(q_rows + sizes["kv_down"], RANK)
        base, merged = adapter(name, tmp_path / name, factors)
        key = attention.format(1) + "linear_qkv."
        delta = ALPHA / RANK * factors[key + "lora_B.default.weight"] @ factors[key + "lora_A.default.weight"]
        for module, part in ((q, delta[:q_rows]), ("linear_kv_down_proj", delta[q_rows:])):
            weight = attention.format(1) + module + ".weight"
            torch.testing.assert_close(merged.read(weight), base.read(weight).float() + part)
