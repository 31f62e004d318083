"""Opening whatever `--load` and `--lora-load` name: an HF folder or a Megatron checkpoint; a base or an adapter."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint, ShardedSource, is_megatron
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource, is_torch_dist
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings, Metadata
from mindspeed_llm.checkpoint.tables import LORA_NAME
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig

BaseSource = HFSource | ShardedSource | TorchDistSource


@dataclass(frozen=True)
class LoraSource:
    """An adapter: its factors as logical tensors `X.lora_A.weight`, `X.lora_B.weight`, and its settings.

    Attributes:
        tensors: the factors (`TensorSource`).
        settings: rank, alpha, targets.
        base: the model it was trained on, as far as the checkpoint records it.
        metadata: of its checkpoint; None when another program wrote it.
        checkpoint: the opened folder, which may hold base weights and optimizer state too.
    """

    tensors: ShardedSource
    settings: LoraSettings
    base: BaseRecord | None
    metadata: Metadata | None
    checkpoint: MegatronCheckpoint


def open_base(
    path: str | Path, family_name: str | None = None, config: ModelConfig | None = None, with_adapter: bool = False
) -> BaseSource:
    """The base weights in a folder, in either format.

    Args:
        family_name: `--model-type-hf`, for Megatron checkpoints that do not say their family.
        config: the model, for Megatron checkpoints without an args.json; their pickled args are read when None.
        with_adapter: the caller also loads the LoRA factors this folder may hold.

    Raises:
        InputError: no model there, a damaged one, or one that holds LoRA weights nobody would load.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give an HF model folder or a Megatron checkpoint")
    if is_torch_dist(folder):
        return TorchDistSource(folder, config, family_name)
    if is_megatron(folder):
        checkpoint = MegatronCheckpoint(folder, family_name, config)
        if checkpoint.lora_names and not checkpoint.missing_base and not with_adapter:
            raise InputError(
                f"{folder}: holds LoRA weights beside the base; give it as --lora-load too, or merge it first"
            )
        return checkpoint.base()
    if (folder / "config.json").is_file():
        return HFSource(folder)
    raise InputError(
        f"{folder}: no model: neither a config.json nor a Megatron checkpoint's tracker or mp_rank_* folders"
    )


def open_lora(
    path: str | Path,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    family_name: str | None = None,
) -> LoraSource:
    """The adapter in a run or iteration folder.

    Settings come from its args.json; flags that contradict them are refused. For a checkpoint of another program the
    rank and the targets follow from the tensors, and `alpha` has to be given.

    Raises:
        InputError: no LoRA weights there, or alpha is recorded nowhere.
        UsageError: a flag contradicts the adapter.
    """
    return adapter_of(MegatronCheckpoint(path, family_name), r, alpha, target_modules)


def adapter_of(
    checkpoint: MegatronCheckpoint,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
) -> LoraSource:
    """The adapter of an opened checkpoint; see `open_lora`."""
    tensors = checkpoint.lora()
    seen = shown_settings(tensors)
    metadata = checkpoint.metadata
    recorded = metadata.lora if metadata else None
    if recorded and recorded.r != seen.r:
        raise InputError(f"{checkpoint.folder}: args.json says rank {recorded.r}, the tensors have {seen.r}; damaged")
    settings = recorded or seen
    if recorded is None and alpha is None:
        raise InputError(f"{checkpoint.folder}: does not record its LoRA alpha; give --lora-alpha as in training")
    if recorded is None:
        settings = dataclasses.replace(seen, alpha=float(alpha))
    flags = (
        ("--lora-r", r, settings.r),
        ("--lora-alpha", alpha, settings.alpha),
        ("--lora-target-modules", target_modules and sorted(target_modules), sorted(settings.target_modules)),
    )
    wrong = [
        f"{flag} says {given}, the adapter says {value}" for flag, given, value in flags if given and given != value
    ]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)} ({checkpoint.folder}); leave these flags out")
    base = metadata.base if metadata else None
    if base is None and not checkpoint.missing_base:
        base = BaseRecord(str(checkpoint.folder), content_hash(checkpoint.base()))
    return LoraSource(tensors, settings, base, metadata, checkpoint)


def shown_settings(tensors: ShardedSource) -> LoraSettings:
    """Rank and targets as the factors show them; alpha is not in them and stays 0.

    Raises:
        InputError: factors of different ranks, or one without its partner.
    """
    ranks: dict[str, set[int]] = {}
    factors: dict[str, set[str]] = {}
    for name in tensors.names():
        match = LORA_NAME.match(name)
        shape = tensors.shape(name)
        ranks.setdefault(match["module"], set()).add(shape[0] if match["factor"] == "lora_A" else shape[1])
        factors.setdefault(match["module"], set()).add(match["factor"])
    found = set().union(*ranks.values())
    if len(found) != 1:
        raise InputError(f"{tensors.path}: LoRA factors of different ranks {sorted(found)} are not supported")
    alone = sorted(module for module, both in factors.items() if len(both) != 2)
    if alone:
        raise InputError(f"{tensors.path}: {alone[0]} has only one of lora_A and lora_B; the checkpoint is damaged")
    targets = tuple(sorted({module.rpartition(".")[2] for module in ranks}))
    return LoraSettings(found.pop(), 0.0, targets)


def source_hash(source: TensorSource) -> str:
    """The content hash of a base: as recorded when it was converted, else computed from its tensors now.

    An HF folder is always computed: its files can change without a trace.
    """
    metadata = getattr(source, "metadata", None)
    return (metadata.content_hash if metadata else None) or content_hash(source)


def check_base(lora: LoraSource, base: TensorSource, base_path: str | Path) -> None:
    """Refuse an adapter of another base.

    Raises:
        InputError: other dimensions, or another content hash than the adapter records.
    """
    differing = config_differences(lora.tensors.config, base.config)
    if differing:
        raise InputError(f"{lora.tensors.path}: adapter of another model than {base_path}: {differing}")
    if lora.base is None or lora.base.hash is None:
        return
    found = source_hash(base)
    if lora.base.hash != found:
        raise InputError(
            f"{lora.tensors.path}: trained on the base {lora.base.path} (content {lora.base.hash[:12]}), but"
            f" {base_path} has content {found[:12]}; give that base"
        )


def config_differences(one: ModelConfig, other: ModelConfig) -> str:
    """The fields in which two models differ: "hidden_size 64 and 128"; empty when they agree.

    Their dtype aside, and their prediction layers: transformers saves models without those and leaves config.json so.
    """
    aside = ("dtype", "mtp_num_layers")
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.compare and field.name not in aside]
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in fields]
    return ", ".join(f"{name} {a} and {b}" for name, a, b in pairs if a != b)
