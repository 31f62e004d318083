"""Where a run starts: which base, which adapter, from scratch or resumed; decided before anything is built."""

from dataclasses import dataclass, replace
from pathlib import Path

from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.formats.mcore import ShardedSource
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import (
    BaseSource,
    LoraSource,
    TrainingCheckpoint,
    adapter_of,
    check_base,
    open_base,
    open_checkpoint,
)
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.lora.config import check_given, continued, settings_from_options
from mindspeed_llm.lora.sources import open_pair, shared_hash
from mindspeed_llm.training.retention import LEFTOVER, iterations


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        base: source of the base weights (of all weights in full tuning).
        base_path: the folder the user named for it.
        adapter: a saved adapter to load, or None.
        settings: LoRA settings; None in full tuning.
        resume: the checkpoint whose iteration, optimizer and random state are continued, or None.
        stale: iteration folders under --save that the first save of this run replaces (--overwrite).
    """

    base: BaseSource
    base_path: str
    adapter: LoraSource | None
    settings: LoraSettings | None
    resume: TrainingCheckpoint | None
    stale: tuple[Path, ...] = ()


def find_start(options: PosttrainOptions) -> Start:
    """Decide the start from --load, --lora-load, --finetune, --auto-resume, --save and --overwrite.

    Raises:
        UsageError: no --load, or flags that contradict what is loaded.
        InputError: nothing there to load, another base, or a --save folder that would be mixed up.
    """
    checkpoint, lora = options.checkpoint, options.lora
    saved = iterations(Path(checkpoint.save)) if checkpoint.save else []
    if checkpoint.auto_resume and saved:
        return _resumed(options, open_checkpoint(saved[-1], options.model.model_type_hf))
    if not checkpoint.load:
        raise UsageError("--load is missing: the HF model folder or Megatron checkpoint to start from")
    if lora.lora_load:
        base, adapter = open_pair(checkpoint.load, lora, options.model.model_type_hf)
        if obstacles := adapter.obstacles():
            raise InputError(
                f"{adapter.path}: training cannot go on from {obstacles[0]}; merge the adapter into its base instead"
            )
        resume = None if options.training.finetune else adapter.checkpoint
        start = Start(base, checkpoint.load, adapter, continued(adapter.live_settings, lora), resume)
    else:
        base = open_base(checkpoint.load, options.model.model_type_hf)
        settings = settings_from_options(lora, base.table)
        start = Start(base, checkpoint.load, None, settings, _own_past(options, base, settings))
    return _checked_save(options, start, saved)


def _resumed(options: PosttrainOptions, checkpoint: TrainingCheckpoint) -> Start:
    """The start of a run that continues `checkpoint`, an adapter or a whole model."""
    lora = options.lora
    if not checkpoint.lora_names:
        if lora.lora_target_modules:
            raise UsageError(
                f"--auto-resume: {checkpoint.folder} is a fully tuned model, but --lora-target-modules asks for LoRA; "
                "choose another --save"
            )
        return Start(checkpoint.base(), options.checkpoint.load or str(checkpoint.folder), None, None, checkpoint)
    if not options.checkpoint.load:
        raise UsageError(f"--load is missing: the base of the adapter in {checkpoint.folder}")
    adapter = adapter_of(checkpoint, lora.lora_r, lora.lora_alpha)
    base = open_base(options.checkpoint.load, options.model.model_type_hf, with_adapter=True)
    check_given(adapter.live_settings, lora, base.table, adapter.path)
    check_base(adapter, base, options.checkpoint.load, shared_hash)
    return Start(base, options.checkpoint.load, adapter, continued(adapter.live_settings, lora), checkpoint)


def _own_past(options: PosttrainOptions, base: BaseSource, settings: LoraSettings | None) -> TrainingCheckpoint | None:
    """The checkpoint to continue when full tuning loads what full tuning saved, unless --finetune."""
    if options.training.finetune or settings is not None or not isinstance(base, ShardedSource | TorchDistSource):
        return None
    if isinstance(base, TorchDistSource) and base.metadata is None:
        return None  # of another program
    checkpoint = open_checkpoint(base.path, options.model.model_type_hf)
    return checkpoint if "optimizer" in checkpoint.first else None


def _checked_save(options: PosttrainOptions, start: Start, saved: list[Path]) -> Start:
    """Refuse to mix a new run into a folder that holds another one's checkpoints."""
    folder = options.checkpoint.save
    if not folder and options.planning.dry_run:
        return start
    if not folder:
        raise UsageError("--save is missing: the folder for the run's checkpoints")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"--save {path} is a file, expected a folder")
    if start.resume is not None and start.resume.folder.parent.resolve() == path.resolve():
        later = tuple(old for old in saved if old.name > start.resume.folder.name)
        if later and not options.checkpoint.overwrite:
            raise InputError(
                f"--save {path} holds {later[-1].name}, which is later than {start.resume.folder.name} that the run "
                "continues; remove the later ones with --overwrite, or choose another folder"
            )
        return replace(start, stale=later)
    if options.checkpoint.auto_resume and not saved:
        return start  # stopped before its first checkpoint: there is nothing that could be mixed up
    if path.is_dir() and any(not LEFTOVER.match(entry.name) for entry in path.iterdir()):
        if not options.checkpoint.overwrite:
            raise InputError(
                f"--save {path} is not empty; continue its run with --auto-resume, replace it with --overwrite, or "
                "choose another folder"
            )
        return replace(start, stale=tuple(saved))
    return start
