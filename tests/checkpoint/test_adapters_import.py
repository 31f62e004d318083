"""Any adapter that peft loads is read exactly: merged weights give the logits of peft."""

from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.open import open_lora
from tests.checkpoint.peft_tiny import adapt, logits, qwen3, same_logits, transformers_of
from tests.models import parity
from tests.models.families import GLM, PHI, QWEN, without_head_dim
from tests.models.tiny_moe import DEEPSEEK_V3, GPT_OSS, MIXTRAL, QWEN3_MOE
from tests.models.tiny_moe import saved as saved_moe

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "every linear layer": {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"},
    "some parts": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "a regular expression": {"r": 3, "target_modules": r".*layers\.[02]\..*(k_proj|down_proj)"},
    "some layers": {"r": 2, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "layers by pattern": {
        "r": 2, "target_modules": ["o_proj"], "layers_to_transform": 2, "layers_pattern": "layers",
    },
    "excluded": {"r": 2, "target_modules": ALL, "exclude_modules": r".*\.1\..*"},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ALL},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ALL,
        "rank_pattern": {"k_proj": 6, r"model\.layers\.1\.mlp\..*": 5, "layers.2.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3, "up_proj": 16, "layers.0.self_attn.k_proj": 1.5},
    },
    "patterns and rslora": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL, "rank_pattern": {"q_proj": 9, "up_proj": 2},
    },
    "biases": {"r": 2, "target_modules": ALL, "bias": "lora_only"},
    "parameters": {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["down_proj.weight", "v_proj.weight"]},
    "embedding": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]},
    "head": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head"]},
    "saved embedding": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "saved ends": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norms": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["input_layernorm", "norm"]},
    "saved part": {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["q_proj"]},
    "tokens": {"r": 2, "target_modules": ["k_proj"], "trainable_token_indices": [5, 2, 30]},
    "tokens by module": {
        "r": 2, "target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [9, 1]},
    },
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ALL},
    "dora of some": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}  # fmt: skip
TIED = {
    "tied ends saved": {
        "r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "tied ends adapted": {"r": 2, "target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
}  # fmt: skip


ENDS = [shape for shape in SHAPES if any(word in shape for word in ("embedding", "head", "ends", "tokens"))]


@pytest.mark.parametrize(("shape", "tied"), [*((shape, False) for shape in SHAPES), *((shape, True) for shape in ENDS)])
def test_merged_weights_give_the_logits_of_peft(shape: str, tied: bool, tmp_path: Path) -> None:
    base = qwen3(tmp_path / "base", tied)
    expected = adapt(base, tmp_path / "adapter", **SHAPES[shape])
    source = HFSource(base)
    merged = MergedSource(source, open_lora(tmp_path / "adapter", base=source))
    same_logits(logits(transformers_of(merged, base, tmp_path / "merged")), expected)


@pytest.mark.parametrize("shape", TIED)
def test_ends_that_peft_keeps_tied_stay_tied(shape: str, tmp_path: Path) -> None:
    base = qwen3(tmp_path / "base", tied=True)
    expected = adapt(base, tmp_path / "adapter", **TIED[shape])
    source = HFSource(base)
    merged = MergedSource(source, open_lora(tmp_path / "adapter", base=source))
    assert merged.config.tie_word_embeddings
    same_logits(logits(transformers_of(merged, base, tmp_path / "merged")), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"]])
def test_saved_embedding_layers_go_into_the_table_itself(targets: list[str], tied: bool, tmp_path: Path) -> None:
    base = qwen3(tmp_path / "base", tied)
    expected = adapt(base, tmp_path / "adapter", save={"save_embedding_layers": True}, r=2, target_modules=targets)
    source = HFSource(base)
    merged = MergedSource(source, open_lora(tmp_path / "adapter", base=source))
    same_logits(logits(transformers_of(merged, base, tmp_path / "merged")), expected)


EXPERTS = {"qwen3-moe": QWEN3_MOE, "mixtral": MIXTRAL, "gpt-oss": GPT_OSS, "deepseek-v3": DEEPSEEK_V3}
BLOCKS: dict[str, dict[str, Any]] = {
    "both": {"r": 3, "lora_alpha": 7, "target_modules": ["o_proj"],
             "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate and up": {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "down": {"r": 2, "target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]},
    "doubled rank": {"r": 2, "target_modules": ["o_proj"],
                     "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                     "rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 16}},
    "one layer": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj"],
                  "target_parameters": ["layers.2.mlp.experts.gate_up_proj"]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "family"),
    [*((shape, "qwen3-moe") for shape in BLOCKS), *((shape, "gpt-oss") for shape in ("both", "one layer"))]
    + [("doubled rank", "mixtral"), ("both", "deepseek-v3")],
)
def test_blocks_of_experts_give_the_logits_of_peft(shape: str, family: str, tmp_path: Path) -> None:
    base = saved_moe(EXPERTS[family])
    expected = adapt(base, tmp_path / "adapter", **BLOCKS[shape])
    source = HFSource(base)
    merged = MergedSource(source, open_lora(tmp_path / "adapter", base=source))
    same_logits(logits(transformers_of(merged, base, tmp_path / "merged")), expected)


FUSED = {"phi3": parity.Tiny("phi3", "Phi3Config", PHI, edit=without_head_dim), "glm4": GLM[0]}


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_unusual_layers_give_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    base = parity.folder(FUSED[family])
    expected = adapt(base, tmp_path / "adapter", r=3, lora_alpha=7, target_modules="all-linear")
    source = HFSource(base)
    merged = MergedSource(source, open_lora(tmp_path / "adapter", base=source))
    same_logits(logits(transformers_of(merged, base, tmp_path / "merged")), expected)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "o_proj"]])
def test_trained_biases_replace_those_of_the_base(targets: list[str], tmp_path: Path) -> None:
    base = parity.folder(next(one for one in QWEN if one.config == "Qwen2Config"))
    expected = adapt(base, tmp_path / "adapter", train=("lora_", "bias"), r=2, target_modules=targets, bias="lora_only")
    source = HFSource(base)
    merged = MergedSource(source, open_lora(tmp_path / "adapter", base=source))
    same_logits(logits(transformers_of(merged, base, tmp_path / "merged")), expected)
