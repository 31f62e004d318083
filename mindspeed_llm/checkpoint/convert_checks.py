"""Flags of a conversion held against the model, the source's layout and the places they name."""

import dataclasses
from pathlib import Path

import torch

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.checkpoint.adapters.peft_config import PeftConfig
from mindspeed_llm.checkpoint.adapters.peft_folder import is_peft
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import ShardedSource
from mindspeed_llm.checkpoint.formats.run_folder import resolve
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.metadata import read_metadata
from mindspeed_llm.checkpoint.open import BaseSource
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import UsageError
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags

POSITIVE = (
    "target_tensor_parallel_size", "target_pipeline_parallel_size", "target_expert_parallel_size",
    "expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by",
    "num_layers", "lora_r",
)  # fmt: skip


def said_format(options: ConvertOptions) -> str | None:
    """The result's format by whichever flag names it; `UsageError` when two name different ones."""
    said = {"--save-model-type": options.save_model_type}
    said |= {"--to-hf": "hf"} if options.to_hf else {}
    said |= {"--to-mcore": "mg"} if options.to_mcore else {}
    named = {value for value in said.values() if value}
    if len(named) > 1:
        raise UsageError(
            f"{' and '.join(flag for flag, value in said.items() if value)} name different formats; give one"
        )
    return next(iter(named), None)


def recorded_base(adapters: list[str] | None) -> str:
    """The folder of the model that the first adapter records as its base.

    Raises:
        UsageError: there is no adapter, or it records none that still exists.
    """
    if not adapters:
        raise UsageError("--load-dir must be given (convert_ckpt.py --help explains it)")
    if is_peft(adapters[0]):
        recorded = PeftConfig.read(Path(adapters[0])).base_model_name_or_path
    else:
        metadata = read_metadata(resolve(adapters[0]))
        recorded = metadata.base.path if metadata and metadata.base else None
    if recorded is None or not Path(recorded).is_dir():
        where = f"records {recorded}, which does not exist" if recorded else "records no base"
        raise UsageError(f"--load-dir is not given, and --lora-load {adapters[0]} {where}; give the base's folder")
    return recorded


def check_numbers(options: ConvertOptions) -> None:
    """`UsageError` for a size that has to be positive and is not."""
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def numbers(text: str | None, flag: str) -> list[int] | None:
    """The numbers of "4,8"; `UsageError` naming the flag for anything else."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: expected numbers separated by commas, as 4,8") from error


def check_model(options: ConvertOptions, config: ModelConfig) -> None:
    """`UsageError` when a flag about the model contradicts it.

    Upstream's `--num-layers` counts no-op layers in some scripts and leaves them out in others; either is right.
    """
    noops = numbers(options.noop_layers, "--noop-layers") or []
    filled = options.num_layers == config.num_layers + len(noops)
    check_architecture_flags(
        config, dataclasses.replace(options, num_layers=None) if filled else options, options.load_dir
    )
    dense, given = dense_first(config), options.first_k_dense_replace
    if given is not None and given != dense:
        raise UsageError(
            f"--first-k-dense-replace says {given}, the model has {dense} layers before the first with experts (read"
            f" from {options.load_dir}); leave it out"
        )
    if options.mtp_num_layers not in (None, 0, config.mtp_num_layers):
        raise UsageError(
            f"--mtp-num-layers says {options.mtp_num_layers}, {options.load_dir} holds {config.mtp_num_layers}"
            " prediction layers; leave it out, or give 0 to leave them behind"
        )


def dense_first(config: ModelConfig) -> int:
    """Layers before the first one with experts."""
    return next(iter(config.moe_layers), config.num_layers)


def check_source_layout(options: ConvertOptions, base: BaseSource) -> None:
    """Hold layout flags against the source's layout where the result, an HF folder, has none.

    Upstream's second converter wants the source's layout retyped; here its files say it.

    Raises:
        UsageError: a flag contradicts the files, or they have no layout.
    """
    if options.save_model_type != "hf":
        return
    layout = base.layout if isinstance(base, ShardedSource) else None
    held = {
        "--num-layers-per-virtual-pipeline-stage": (
            options.num_layers_per_virtual_pipeline_stage,
            layout and layout.layers_per_virtual_stage,
        ),
        "--num-layer-list": (numbers(options.num_layer_list, "--num-layer-list"), layout and layout.stage_layers),
        "--noop-layers": (numbers(options.noop_layers, "--noop-layers"), layout and layout.noop_layers),
        "--expert-tensor-parallel-size": (options.expert_tensor_parallel_size, layout and layout.etp),
        "--moe-tp-extend-ep": (options.moe_tp_extend_ep or None, layout and layout.tp_extends_ep),
        "--schedules-method": (options.schedules_method, layout and ("dualpipev" if layout.v_shaped else None)),
    }
    wrong = [
        f"{flag} says {given}, the source has {found}"
        for flag, (given, found) in held.items()
        if given not in (None, found)
    ]
    if wrong:
        raise UsageError(
            f"{'; '.join(wrong)} ({options.load_dir}); the source's files say how it is split, and hf is not split:"
            " leave these flags out"
        )


def check_places(options: ConvertOptions, final: Path, base: BaseSource, lora: LoraSource | None) -> None:
    """`UsageError` when the result would take the place of what it is made from, or its run would point to it."""
    sources = {"--load-dir": base.path} | ({"--lora-load": lora.path} if lora else {})
    for flag, path in sources.items():
        path, target = Path(path).resolve(), final.resolve()
        same_run = options.save_model_type == "mg" and target.parent in (path, path.parent)
        if target == path or same_run:
            raise UsageError(f"--save-dir {options.save_dir} is the folder of {flag} ({path}); choose another one")


class WithoutPredictions:
    """A source without its multi-token-prediction layers (`TensorSource`)."""

    def __init__(self, base: TensorSource) -> None:
        """Show everything of `base` but those layers."""
        self.base = base
        self.config = dataclasses.replace(base.config, mtp_num_layers=0)
        self.table = WeightTable(self.config)

    @property
    def note(self) -> str:
        """What is left out, for the program to say."""
        left = len(self.base.names()) - len(self.names())
        return f"--mtp-num-layers 0: {self.base.config.mtp_num_layers} prediction layers ({left} tensors) are left out"

    def names(self) -> list[str]:
        """Logical names."""
        return [name for name in self.base.names() if name in self.table.entries]

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns."""
        return self.base.dtype(name)

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it."""
        return self.base.read(name, rows, columns)
