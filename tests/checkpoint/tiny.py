"""Small models with no two sizes alike, made without transformers, and short ways to convert them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mindspeed_llm.checkpoint.atomic import iteration_folder, write_tracker
from mindspeed_llm.checkpoint.formats.lazy import InMemory, TensorSource, assemble
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_writer import write_mcore
from mindspeed_llm.checkpoint.formats.torch_file import write_torch_file
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, Layout
from mindspeed_llm.checkpoint.live import local_slice
from mindspeed_llm.checkpoint.metadata import LoraSettings, Metadata, write_metadata
from mindspeed_llm.checkpoint.tables import LAYER_NUMBER, LORA_NAME, WeightTable, file_key
from mindspeed_llm.models.config import ModelConfig

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def hf_config(tied: bool = False, layers: int = 4, dtype: str = "bfloat16") -> dict:
    """A Qwen3 config.json: 6 heads of 10 in 2 groups, hidden 24, ffn 44, 37 rows of vocabulary."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 44,
        "vocab_size": 37,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def make_hf(folder: Path, tied: bool = False, layers: int = 4, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """An HF folder with random weights (norms around 1) and a made-up tokenizer file."""
    folder.mkdir(parents=True)
    raw = hf_config(tied, layers, dtype)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for hf, (entry, part) in WeightTable(ModelConfig.from_hf(folder)).hf_names.items():
        values = torch.randn(entry.hf_shape(part), generator=generator)
        tensors[hf] = (values * 0.1 + ("norm" in hf)).to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_mcore(
    source: TensorSource, folder: Path, layout: Layout, metadata: Metadata | None = None
) -> MegatronCheckpoint:
    """A Megatron checkpoint of `source`, with an args.json only if `metadata` is given."""
    target = folder / iteration_folder(1)
    target.mkdir(parents=True)
    write_mcore(source, target, layout)
    if metadata:
        write_metadata(target, metadata)
    write_tracker(folder, 1)
    return MegatronCheckpoint(folder)


def random_adapter(table: WeightTable, rank: int = 3, targets: tuple[str, ...] = TARGETS, seed: int = 5) -> dict:
    """Both factors of every target, non-zero, by logical name."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in table.entries:
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            for factor in ("lora_A", "lora_B"):
                key = f"{module}.{factor}.weight"
                factors[key] = torch.randn(table.shape(key, rank), generator=generator) * 0.3
    return factors


def write_adapter(
    folder: Path,
    table: WeightTable,
    factors: dict[str, torch.Tensor],
    layout: Layout,
    settings: LoraSettings | None = None,
    **fields: object,
) -> Path:
    """A LoRA checkpoint as training saves it with `--lora-ckpt-filter`; `settings` None leaves out the args.json."""
    target = folder / iteration_folder(20)
    for tp_rank, pp_rank, _ in layout.ranks():
        content: dict = {"args": None, "checkpoint_version": 3.0, "iteration": 20}
        for vp_rank, key in enumerate(layout.model_keys()):
            layers = layout.slots(pp_rank, vp_rank)
            content[key] = {
                file_key(name, layers[0]): local_slice(table, name, values, layout.tp, tp_rank).contiguous()
                for name, values in factors.items()
                if LORA_NAME.match(name) and int(LAYER_NUMBER.search(name)[0]) in layers
            }
        path = target / layout.rank_folder(tp_rank, pp_rank) / CHECKPOINT_FILE
        path.parent.mkdir(parents=True)
        write_torch_file(path, content)
    if settings:
        write_metadata(target, Metadata(table.config, layout, 20, lora=settings, **fields))
    write_tracker(folder, 20)
    return folder


def join_slices(
    table: WeightTable, name: str, shares: Sequence[torch.Tensor], padded_rows: int | None = None
) -> torch.Tensor:
    """The unsharded tensor of all ranks' shares: the inverse of `local_slice`."""
    return assemble([InMemory(share) for share in shares], table.shard_map(name, len(shares), padded_rows))
