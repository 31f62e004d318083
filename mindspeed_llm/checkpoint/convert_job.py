"""A conversion with everything opened and checked, before anything is written."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.checkpoint.adapters.combine import combine
from mindspeed_llm.checkpoint.atomic import iteration_folder
from mindspeed_llm.checkpoint.convert_checks import (
    WithoutPredictions,
    check_model,
    check_numbers,
    check_places,
    check_source_layout,
    numbers,
    recorded_base,
    said_format,
)
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_names import Dialect
from mindspeed_llm.checkpoint.formats.run_folder import is_megatron
from mindspeed_llm.checkpoint.formats.safetensors_file import is_export
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource, is_torch_dist
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.open import (
    BaseSource,
    LoraSource,
    adapter_of,
    check_base,
    config_differences,
    open_lora,
)
from mindspeed_llm.checkpoint.result import refuse_taken
from mindspeed_llm.checkpoint.sizes import parse_size
from mindspeed_llm.checkpoint.targets import FactorFiles, HfFolder, PeftFolder, RankFiles, Target, TorchDist
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig

DTYPES = {
    name: dtype
    for dtype, names in {
        torch.bfloat16: ("bf16", "bfloat16"),
        torch.float16: ("fp16", "float16"),
        torch.float32: ("fp32", "float32"),
    }.items()
    for name in names
}
ITERATION = 1
"""The iteration number of a conversion, as upstream writes it."""
HF_SUBFOLDER = "mg2hg"


@dataclass(frozen=True)
class Job:
    """One conversion, everything checked.

    Attributes:
        source: what to write: the base, merged and cast, or the adapter's tensors.
        base: the source as it lies in its folder.
        lora: the adapter merged in, or written alone.
        origin: the HF folder that gives config and tokenizer; None when none is known.
        final: the folder that will appear.
        target: how it is written.
        overwrite: a result that lies there is replaced.
        notes: what is read otherwise than it lies there or left out, one line each, for the program to say.
    """

    source: TensorSource
    base: BaseSource
    lora: LoraSource | None
    origin: Path | None
    final: Path
    target: Target
    overwrite: bool
    notes: tuple[str, ...] = ()

    @property
    def adapter_only(self) -> bool:
        """Whether the adapter is written and not the model."""
        return isinstance(self.target, FactorFiles | PeftFolder)


def prepare(options: ConvertOptions) -> Job:
    """Open and check everything.

    Args:
        options: with both formats named (`with_formats`).

    Raises:
        UsageError: flags that contradict each other, the model or the adapter.
        InputError: a source that is missing, damaged or does not fit.
    """
    check_flags(options)
    check_numbers(options)
    base, lora = open_source(options)
    final = result_folder(options, recorded_folders(base, lora))
    check_places(options, final, base, lora)
    check_model(options, base.config)
    check_source_layout(options, base)
    alone = options.save_lora_to_hf or not options.merge_lora
    if alone and lora is None:
        raise UsageError("--merge-lora false and --save-lora-to-hf need an adapter; give it with --lora-load")
    dtype = DTYPES[options.params_dtype] if options.params_dtype else None
    if alone:
        own = lora.live if options.save_model_type == "mg" else lora.tensors
        source = own if dtype is None else MergedSource(own, None, dtype)
    else:
        source = base if lora is None and dtype is None else MergedSource(base, lora, dtype)
    notes = list(base.notes)
    if options.mtp_num_layers == 0 and source.config.mtp_num_layers and not alone:
        source = WithoutPredictions(source)
        notes.append(source.note)
    origin = companion_origin(options, base, lora)
    if origin is not None:
        differing = config_differences(ModelConfig.from_hf(origin), base.config)
        if differing:
            raise InputError(f"{origin}: config.json is of another model than {options.load_dir}: {differing}")
    elif options.save_model_type == "hf" and not alone:
        raise InputError(
            f"{options.load_dir}: records no HF folder that still exists, so the result would have no config and"
            " tokenizer; give it with --hf-cfg-dir"
        )
    target = adapter_target(options, base, lora, origin) if alone else target_of(options, base.config)
    target.check(source)
    return Job(source, base, lora, origin, final, target, options.overwrite, tuple(notes))


def with_formats(options: ConvertOptions) -> ConvertOptions:
    """The options with the source and both formats named: its own as its files show, the result's the other one."""
    options = dataclasses.replace(options, load_dir=options.load_dir or recorded_base(options.lora_load))
    folder = Path(options.load_dir)
    if not folder.is_dir():
        raise InputError(f"--load-dir {folder}: no such folder")
    try:
        os.stat(options.save_dir)
    except FileNotFoundError:
        pass
    except OSError as error:  # a loop of links, a file among the parents, too long a name
        raise InputError(f"--save-dir {options.save_dir}: cannot be used ({error.strerror}); choose another") from error
    loaded = options.load_model_type or ("mg" if is_megatron(folder) else "hf")
    saved = said_format(options) or ("hf" if loaded == "mg" or options.save_lora_to_hf else "mg")
    options = dataclasses.replace(options, load_model_type=loaded, save_model_type=saved)
    if options.to_hf:  # where this flag comes from, sizes are those of the converting processes
        sizes = dict.fromkeys((f"target_{one}_parallel_size" for one in ("tensor", "pipeline", "expert")), 1)
        options = dataclasses.replace(options, **sizes)
    return options


def check_flags(options: ConvertOptions) -> None:
    """`UsageError` for flags that cannot be meant together."""
    layout = {
        "--target-tensor-parallel-size": options.target_tensor_parallel_size != 1,
        "--target-pipeline-parallel-size": options.target_pipeline_parallel_size != 1,
        "--target-expert-parallel-size": options.target_expert_parallel_size != 1,
        "--num-layers-per-virtual-pipeline-stage": options.num_layers_per_virtual_pipeline_stage,
        "--num-layer-list": options.num_layer_list,
        "--noop-layers": options.noop_layers,
    }
    wrong = [flag for flag, given in layout.items() if given]
    if options.save_model_type == "hf":
        # Those about the pipeline may describe an mg source's layout, against which they are held later.
        wrong = wrong if options.load_model_type == "hf" else [flag for flag in wrong if flag.startswith("--target")]
        if options.ckpt_format == "torch_dist":
            wrong.append("--ckpt-format")
        if wrong:
            raise UsageError(f"--save-model-type hf is not split over ranks; leave {', '.join(wrong)} out")
    elif options.ckpt_format == "torch_dist":
        stored = {
            "--expert-tensor-parallel-size": options.expert_tensor_parallel_size,
            "--moe-tp-extend-ep": options.moe_tp_extend_ep,
            "--moe-grouped-gemm": options.moe_grouped_gemm,
            "--schedules-method": options.schedules_method,
            "--make-vocab-size-divisible-by": options.make_vocab_size_divisible_by != 1,
            "--transformer-impl": options.transformer_impl != "local",
        }
        wrong += [flag for flag, given in stored.items() if given]
        if wrong:
            raise UsageError(f"--ckpt-format torch_dist loads at every layout; leave {', '.join(wrong)} out")
    if options.save_lora_to_hf and options.save_model_type != "hf":
        raise UsageError("--save-lora-to-hf writes a PEFT folder; give --save-model-type hf, or leave it out")
    if (
        options.load_model_type == options.save_model_type == "hf"
        and not options.lora_load
        and not options.params_dtype
    ):
        raise UsageError("hf to hf without --lora-load or --params-dtype changes nothing; copy the folder instead")
    if Path(options.load_dir).resolve() == Path(options.save_dir).resolve() and "mg" in (
        options.load_model_type,
        options.save_model_type,
    ):
        raise UsageError(f"--save-dir is --load-dir ({options.load_dir}); choose another folder")


def target_of(options: ConvertOptions, config: ModelConfig) -> Target:
    """How the result is written."""
    if options.save_model_type == "hf":
        return HfFolder(parse_size(options.max_shard_size, "--max-shard-size"))
    if options.ckpt_format == "torch_dist":
        return TorchDist(ITERATION)
    dialect = Dialect(options.transformer_impl, options.moe_grouped_gemm)
    return RankFiles(target_layout(options, config), dialect, options.make_vocab_size_divisible_by, ITERATION)


def adapter_target(options: ConvertOptions, base: BaseSource, lora: LoraSource, origin: Path | None) -> Target:
    """How an adapter alone is written; `InputError` when the format cannot hold it."""
    if options.save_model_type == "hf":
        if options.params_dtype:
            raise UsageError("--params-dtype does not apply to a PEFT folder, which keeps the factors' type")
        return PeftFolder(lora, str((origin or base.path).resolve()))
    if options.ckpt_format == "torch_dist":
        raise UsageError("--ckpt-format torch_dist does not hold adapters here; leave it out, or merge the adapter")
    lora.require_plain_factors("a Megatron LoRA checkpoint")
    return FactorFiles(target_layout(options, base.config), ITERATION)


def target_layout(options: ConvertOptions, config: ModelConfig) -> Layout:
    """The layout of an mg result."""
    return Layout.create(
        config.num_layers,
        options.target_tensor_parallel_size,
        options.target_pipeline_parallel_size,
        options.num_layers_per_virtual_pipeline_stage,
        stage_layers=numbers(options.num_layer_list, "--num-layer-list"),
        noop_layers=numbers(options.noop_layers, "--noop-layers") or (),
        ep=options.target_expert_parallel_size,
        etp=options.expert_tensor_parallel_size,
        tp_extends_ep=options.moe_tp_extend_ep,
        v_shaped=options.schedules_method == "dualpipev",
    )


def open_source(options: ConvertOptions) -> tuple[BaseSource, LoraSource | None]:
    """The base, and the adapter to merge: that of `--lora-load`, or the one inside the source."""
    folder = Path(options.load_dir)
    settings = (options.lora_r, options.lora_alpha, options.lora_target_modules)
    if options.load_model_type == "hf":
        if is_megatron(folder):
            raise UsageError(f"--load-dir {folder} is a Megatron checkpoint; give --load-model-type mg")
        base: BaseSource = HFSource(folder, options.ignore_unknown)
        inside = None
    else:
        if not is_megatron(folder) and (folder / "config.json").is_file():
            raise UsageError(f"--load-dir {folder} is an HF folder; give --load-model-type hf")
        given = given_origin(options)
        config = ModelConfig.from_hf(given) if given else None
        if is_torch_dist(folder):
            base, inside = TorchDistSource(folder, config, options.model_type_hf, options.ignore_unknown), None
        else:
            inside = MegatronCheckpoint(folder, options.model_type_hf, config, options.ignore_unknown)
            base = inside.base()
    if options.lora_load:
        if inside is not None and inside.lora_names:
            raise UsageError(
                f"--load-dir {folder} holds LoRA weights itself; leave --lora-load {' '.join(options.lora_load)} out"
            )
        return base, open_adapters(options, base)
    if inside is not None and inside.lora_names:
        return base, adapter_of(inside, *settings)
    if any(settings) or options.lora_weights:
        raise UsageError(
            "--lora-r, --lora-alpha, --lora-target-modules and --lora-weights need --lora-load, which is not given"
        )
    return base, None


def open_adapters(options: ConvertOptions, base: BaseSource) -> LoraSource:
    """The weighted sum of the adapters of `--lora-load`, each held against the base."""
    paths = options.lora_load
    weights = options.lora_weights or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UsageError(f"--lora-weights has {len(weights)} values for {len(paths)} adapters of --lora-load")
    opened = []
    for path in paths:
        flags = (options.lora_r, options.lora_alpha, options.lora_target_modules)
        lora = open_lora(path, *flags, family_name=options.model_type_hf, base=base)
        check_base(lora, base, options.load_dir)
        opened.append(lora)
    return combine(list(zip(opened, weights, strict=True)))


def given_origin(options: ConvertOptions) -> Path | None:
    """The HF folder named on the command line: `--hf-cfg-dir`, or a `--save-dir` that already holds the model."""
    if options.hf_cfg_dir:
        return Path(options.hf_cfg_dir)
    saved = Path(options.save_dir)
    return saved if options.save_model_type == "hf" and (saved / "config.json").is_file() else None


def recorded_folders(base: BaseSource, lora: LoraSource | None) -> list[Path]:
    """The folders that the source and the adapter record as their base, those that still are HF folders."""
    described = [None if isinstance(base, HFSource) else base.metadata, lora and lora.metadata]
    folders = [Path(metadata.base.path) for metadata in described if metadata and metadata.base]
    return [folder for folder in folders if (folder / "config.json").is_file()]


def companion_origin(options: ConvertOptions, base: BaseSource, lora: LoraSource | None) -> Path | None:
    """The HF folder config and tokenizer come from: given, or the source itself, or the one recorded."""
    if given := given_origin(options):
        return given
    if isinstance(base, HFSource):
        return base.path
    return next(iter(recorded_folders(base, lora)), None)


def result_folder(options: ConvertOptions, bases: list[Path]) -> Path:
    """Where the result goes.

    An hf result goes into a subfolder of a `--save-dir` that holds a model: the original, as upstream's scripts have
    it. An export of ours that nothing records as its base is no original but an earlier result.

    Raises:
        UsageError: a result lies there and `--overwrite` is not given.
    """
    saved = Path(options.save_dir)
    if saved.exists() and not saved.is_dir():
        raise InputError(f"--save-dir {saved} is a file; choose a folder")
    if options.save_model_type == "hf":
        original = (saved / "config.json").is_file()
        if original and is_export(saved):
            original = saved.resolve() in [base.resolve() for base in (*bases, Path(options.load_dir))]
        final = saved / HF_SUBFOLDER if original else saved
    else:
        final = saved / iteration_folder(ITERATION)
    refuse_taken(final, options.save_model_type == "mg", options.overwrite)
    return final
