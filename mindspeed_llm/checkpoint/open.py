"""Opening whatever `--load` and `--lora-load` name: an HF folder or a Megatron checkpoint; a base or an adapter."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mindspeed_llm.checkpoint.adapters.import_ import open_peft
from mindspeed_llm.checkpoint.adapters.parts import adapted_parts, described_targets
from mindspeed_llm.checkpoint.adapters.peft_folder import is_peft
from mindspeed_llm.checkpoint.adapters.settings import chosen_parts, module_entries, settings_of
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.adapters.stored import show_stored
from mindspeed_llm.checkpoint.adapters.tied import lookup_unties
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint, ShardedSource
from mindspeed_llm.checkpoint.formats.run_folder import is_megatron
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource, is_torch_dist
from mindspeed_llm.checkpoint.formats.torch_dist_run import DistCheckpoint
from mindspeed_llm.checkpoint.metadata import BaseRecord
from mindspeed_llm.checkpoint.tables import LORA_NAME
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig

BaseSource = HFSource | ShardedSource | TorchDistSource
TrainingCheckpoint = MegatronCheckpoint | DistCheckpoint


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
        source = TorchDistSource(folder, config, family_name)
        if source.lora_names and not with_adapter:
            raise beside_base(folder)
        return source
    if is_megatron(folder):
        checkpoint = MegatronCheckpoint(folder, family_name, config)
        if checkpoint.lora_names and not checkpoint.missing_base and not with_adapter:
            raise beside_base(folder)
        return checkpoint.base()
    if (folder / "config.json").is_file():
        return HFSource(folder)
    raise InputError(
        f"{folder}: no model: neither a config.json nor a Megatron checkpoint's tracker or mp_rank_* folders"
    )


def beside_base(folder: Path) -> InputError:
    """What is wrong with taking a checkpoint of a base and its adapter for a base."""
    return InputError(f"{folder}: holds LoRA weights beside the base; give it as --lora-load too, or merge it first")


def open_checkpoint(path: str | Path, family_name: str | None = None) -> TrainingCheckpoint:
    """A checkpoint with all that training saved in it, in either format.

    Args:
        family_name: `--model-type-hf`, for checkpoints that do not say their family.
    """
    return DistCheckpoint(path) if is_torch_dist(path) else MegatronCheckpoint(path, family_name)


def open_lora(
    path: str | Path,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    family_name: str | None = None,
    base: TensorSource | None = None,
) -> LoraSource:
    """The adapter in a run or iteration folder, or in a PEFT folder.

    Settings come from its args.json or adapter_config.json; flags that contradict them are refused. For a checkpoint of
    another program the ranks and the targets follow from the tensors, and `alpha` has to be given.

    Args:
        r, alpha, target_modules: flags to check.
        family_name: `--model-type-hf`, for Megatron checkpoints that do not say their family.
        base: the model a PEFT adapter is to be used with.

    Raises:
        InputError: no LoRA weights there, or alpha is recorded nowhere.
        UsageError: a flag contradicts the adapter.
    """
    if not is_peft(path):
        return adapter_of(open_checkpoint(path, family_name), r, alpha, target_modules)
    if base is None:
        raise InputError(f"{path}: a PEFT adapter does not describe its base; open the base first and give it too")
    lora = open_peft(path, base)
    check_flags(lora, r, alpha, target_modules)
    return lora


def adapter_of(
    checkpoint: TrainingCheckpoint,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
) -> LoraSource:
    """The adapter of an opened checkpoint; see `open_lora`."""
    tensors = checkpoint.lora(checkpoint.metadata.lora if checkpoint.metadata else None)
    ranks = stored_ranks(tensors)
    metadata = checkpoint.metadata
    settings = metadata.lora if metadata else None
    if settings is None and alpha is None:
        raise InputError(f"{checkpoint.folder}: does not record its LoRA alpha; give --lora-alpha as in training")
    if settings is None:
        one = {module: float(alpha) / rank for module, rank in ranks.items()}
        settings = settings_of(ranks, one, tensors.table)
    for module, rank in ranks.items():
        if settings.rank(module) != rank or not settings.adapts(module):
            said = f"rank {settings.rank(module)}" if settings.adapts(module) else "no adapter"
            raise InputError(
                f"{checkpoint.folder}: args.json says {said} for {module}, the tensors have rank {rank}; damaged"
            )
    base = metadata.base if metadata else None
    if base is None and not checkpoint.missing_base:
        base = BaseRecord(str(checkpoint.folder), content_hash(checkpoint.base()))
    unties = lookup_unties(checkpoint.config, ranks)
    lora = show_stored(LoraSource(tensors, settings, base, metadata, checkpoint, unties))
    check_flags(lora, r, alpha, target_modules)
    return lora


def check_flags(lora: LoraSource, r: int | None, alpha: float | None, target_modules: Sequence[str] | None) -> None:
    """`UsageError` when flags contradict the adapter. Targets may be named as megatron-core or as HF names them."""
    settings, table = lora.live_settings, lora.tensors.table
    wrong = [
        f"{flag} says {given:g}, the adapter says {value:g}"
        for flag, given, value in (("--lora-r", r, settings.r), ("--lora-alpha", alpha, settings.alpha))
        if given and given != value
    ]
    if target_modules:
        layers = table.config.num_layers  # those after them predict further tokens, and have no adapters
        entries = {name: one for name, one in module_entries(table).items() if one.layer is None or one.layer < layers}
        given = chosen_parts(target_modules, entries, "--lora-target-modules")
        if given != {module: set(adapted_parts(settings, module, entries[module])) for module in lora.modules()}:
            wrong.append(
                f"--lora-target-modules says {' '.join(sorted(target_modules))}, the adapter says"
                f" {' '.join(described_targets(settings))}"
            )
    if wrong:
        raise UsageError(f"{'; '.join(wrong)} ({lora.path}); leave these flags out")


def stored_ranks(tensors: TensorSource) -> dict[str, int]:
    """Each adapted module's rank as its factors show it.

    Raises:
        InputError: a factor without its partner, or one of another rank.
    """
    ranks: dict[str, dict[str, int]] = {}
    for name in tensors.names():
        match = LORA_NAME.match(name)
        if match and match["factor"] in ("lora_A", "lora_B"):
            shape = tensors.shape(name)
            rank = shape[0] if match["factor"] == "lora_A" else shape[1]
            ranks.setdefault(match["module"], {})[match["factor"]] = rank
    for module, own in ranks.items():
        if len(own) != 2:
            raise InputError(f"{tensors.path}: {module} has only one of lora_A and lora_B; the checkpoint is damaged")
        if own["lora_A"] != own["lora_B"]:
            raise InputError(
                f"{tensors.path}: {module} has rank {own['lora_A']} in lora_A and {own['lora_B']} in lora_B; the"
                " checkpoint is damaged"
            )
    return {module: own["lora_A"] for module, own in ranks.items()}


def source_hash(source: TensorSource, stopped: Callable[[], bool] = lambda: False) -> str:
    """The content hash of a base: as recorded when it was converted, else computed from its tensors now.

    An HF folder is computed by every program: its files can change without a trace. An opened source remembers it,
    for it is asked several times and takes a read of the whole model. `stopped` is that of `content_hash`.
    """
    metadata = getattr(source, "metadata", None)
    if metadata and metadata.content_hash:
        return metadata.content_hash
    known = getattr(source, "known_hash", None) or content_hash(source, stopped=stopped)
    source.known_hash = known
    return known


def check_base(
    lora: LoraSource,
    base: TensorSource,
    base_path: str | Path,
    hash_of: Callable[[TensorSource], str] = source_hash,
) -> None:
    """Refuse an adapter of another base.

    Args:
        hash_of: gives the base's content hash, asked only where the adapter records one.

    Raises:
        InputError: other dimensions, or another content hash than the adapter records.
    """
    differing = config_differences(lora.tensors.config, base.config)
    if differing:
        raise InputError(f"{lora.path}: adapter of another model than {base_path}: {differing}")
    if lora.base is None or lora.base.hash is None:
        return
    found = hash_of(base)
    if lora.base.hash != found:
        raise InputError(
            f"{lora.path}: trained on the base {lora.base.path} (content {lora.base.hash[:12]}), but"
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
