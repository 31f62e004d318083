"""`convert_ckpt.py`: between HF folders and Megatron checkpoints of any layout, merging an adapter on the way.

    open the source -> wrap it (merge, cast) -> write it tensor by tensor into a staged folder -> publish

The source's own layout, sizes and adapter settings are read from its files; flags about them are only checked.
"""

import contextlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.checkpoint.atomic import TRACKER, StagedDirectory, iteration_folder, write_tracker
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource, copy_companions, write_hf
from mindspeed_llm.checkpoint.formats.lazy import TensorSource, element_count
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint, is_megatron
from mindspeed_llm.checkpoint.formats.mcore_names import Dialect
from mindspeed_llm.checkpoint.formats.mcore_writer import check_layout, rank_bytes, write_mcore
from mindspeed_llm.checkpoint.formats.safetensors_file import is_export
from mindspeed_llm.checkpoint.kinds import padded_vocabulary
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.metadata import BaseRecord, Metadata, write_metadata
from mindspeed_llm.checkpoint.open import (
    BaseSource,
    LoraSource,
    adapter_of,
    check_base,
    config_differences,
    open_lora,
    source_hash,
)
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ITERATION = 1
"""The iteration number of a conversion, as upstream writes it."""
HF_SUBFOLDER = "mg2hg"
HF_SUBFOLDER_ALIAS = "mg2hf"
"""Upstream's documents and scripts say mg2hg, its program wrote mg2hf; the second is a link to the first."""


@dataclass(frozen=True)
class Job:
    """One conversion, everything checked.

    Attributes:
        source: what to write, merged and cast.
        base: the source as it lies in its folder.
        lora: the adapter merged in.
        origin: the HF folder that gives config and tokenizer; None when none is known.
        final: the folder that will appear.
    """

    source: TensorSource
    base: BaseSource
    lora: LoraSource | None
    origin: Path | None
    final: Path


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status 0.

    Raises:
        UsageError: flags that contradict each other, the model or the adapter.
        InputError: a source that is missing, damaged or does not fit, or a result that cannot be written.
    """
    options = parse(ConvertOptions, argv, ConvertOptions.SCRIPT)
    started = time.monotonic()
    job = prepare(options)
    written = to_hf(options, job) if options.save_model_type == "hf" else to_megatron(options, job)
    report(options, job, written, time.monotonic() - started)
    return 0


def prepare(options: ConvertOptions) -> Job:
    """Open and check everything; nothing is written yet."""
    check_flags(options)
    base, lora = open_source(options)
    final = result_folder(options, recorded_folders(base, lora))
    config = base.config
    check_architecture_flags(config, options, options.load_dir)
    if lora is not None:
        check_base(lora, base, options.load_dir)
    dtype = DTYPES[options.params_dtype] if options.params_dtype else None
    source = base if lora is None and dtype is None else MergedSource(base, lora, dtype)
    origin = companion_origin(options, base, lora)
    if origin is not None:
        differing = config_differences(ModelConfig.from_hf(origin), config)
        if differing:
            raise InputError(f"{origin}: config.json is of another model than {options.load_dir}: {differing}")
    elif options.save_model_type == "hf":
        raise InputError(
            f"{options.load_dir}: records no HF folder that still exists, so the result would have no config and"
            " tokenizer; give it with --hf-cfg-dir"
        )
    return Job(source, base, lora, origin, final)


def check_flags(options: ConvertOptions) -> None:
    """`UsageError` for flags that cannot be meant together."""
    if options.target_expert_parallel_size != 1:
        raise UsageError(
            f"--target-expert-parallel-size {options.target_expert_parallel_size}: only 1 is supported yet"
        )
    split = (options.target_tensor_parallel_size, options.target_pipeline_parallel_size)
    if options.save_model_type == "hf" and split != (1, 1):
        raise UsageError(
            f"--save-model-type hf is not split, target sizes say TP{split[0]} PP{split[1]}; leave them at 1"
        )
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


def open_source(options: ConvertOptions) -> tuple[BaseSource, LoraSource | None]:
    """The base, and the adapter to merge: that of `--lora-load`, or the one inside the source."""
    folder = Path(options.load_dir)
    if not folder.is_dir():
        raise InputError(f"--load-dir {folder}: no such folder")
    settings = (options.lora_r, options.lora_alpha, options.lora_target_modules)
    if options.load_model_type == "hf":
        if is_megatron(folder):
            raise UsageError(f"--load-dir {folder} is a Megatron checkpoint; give --load-model-type mg")
        base: BaseSource = HFSource(folder)
        inside = None
    else:
        if not is_megatron(folder) and (folder / "config.json").is_file():
            raise UsageError(f"--load-dir {folder} is an HF folder; give --load-model-type hf")
        given = given_origin(options)
        config = ModelConfig.from_hf(given) if given else None
        inside = MegatronCheckpoint(folder, options.model_type_hf, config)
        base = inside.base()
    if options.lora_load:
        if inside is not None and inside.lora_names:
            raise UsageError(
                f"--load-dir {folder} holds LoRA weights itself; leave --lora-load {options.lora_load} out"
            )
        return base, open_lora(options.lora_load, *settings, family_name=options.model_type_hf)
    if inside is not None and inside.lora_names:
        return base, adapter_of(inside, *settings)
    if any(settings):
        raise UsageError("--lora-r, --lora-alpha and --lora-target-modules need --lora-load, which is not given")
    return base, None


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
        exists = any(final.glob("*.safetensors"))
    else:
        final = saved / iteration_folder(ITERATION)
        exists = final.exists() or (saved / TRACKER).exists()
    if exists and not options.overwrite:
        raise UsageError(f"{final}: a result is there already; give --overwrite to replace it, or another --save-dir")
    return final


def staged(folder: Path, write: Callable[[StagedDirectory], None]) -> None:
    """Write through a staged folder; on any failure nothing becomes visible."""
    stage = StagedDirectory(folder)
    stage.create()
    try:
        write(stage)
    except OSError as error:
        stage.discard()
        raise InputError(f"{folder}: cannot be written ({error.strerror}); nothing was left behind") from error
    except BaseException:
        stage.discard()
        raise


def to_megatron(options: ConvertOptions, job: Job) -> int:
    """Write the Megatron checkpoint; returns the bytes of its tensors."""
    layout = Layout.even(
        job.source.config.num_layers,
        options.target_tensor_parallel_size,
        options.target_pipeline_parallel_size,
        options.num_layers_per_virtual_pipeline_stage,
    )
    divisible_by = options.make_vocab_size_divisible_by
    padded = padded_vocabulary(job.source.config.vocab_size, layout.tp, divisible_by)
    check_layout(job.source.table, layout, padded)
    total = sum(rank_bytes(job.source, layout, rank, Dialect(), padded) for rank in layout.ranks())
    check_space(job.final, total)

    def write(stage: StagedDirectory) -> None:
        with ThreadPoolExecutor(1) as pool, progress_bar(total) as bar:
            hashed = pool.submit(content_hash, job.source)
            write_mcore(job.source, stage.path, layout, ITERATION, divisible_by, bar.update)
            write_metadata(stage.path, describe(job, layout, hashed))
        stage.publish()

    staged(job.final, write)
    write_tracker(job.final.parent, ITERATION)
    return total


def describe(job: Job, layout: Layout, hashed: "Future[str]") -> Metadata:
    """The args.json of a conversion: an unchanged model's base is the HF folder it came from."""
    recorded = job.base.metadata.base if not isinstance(job.base, HFSource) and job.base.metadata else None
    if isinstance(job.base, HFSource):
        unchanged = job.source is job.base
        recorded = BaseRecord(str(job.base.path.resolve()), hashed.result() if unchanged else source_hash(job.base))
    elif recorded is None and job.origin is not None:
        recorded = BaseRecord(str(job.origin.resolve()), None)
    return Metadata(job.source.config, layout, ITERATION, hashed.result(), recorded)


def to_hf(options: ConvertOptions, job: Job) -> int:
    """Write the HF folder; returns the bytes of its tensors."""
    total = sum(element_count(job.source.shape(n)) * job.source.dtype(n).itemsize for n in job.source.names())
    check_space(job.final, total)

    def write(stage: StagedDirectory) -> None:
        with progress_bar(total) as bar:
            write_hf(job.source, stage.path, progress=bar.update)
        copy_companions(job.origin, stage.path, job.source.config)
        if not job.final.is_dir() or not any(job.final.iterdir()):
            stage.publish()
            return
        # Other files of the user lie there: without its config.json the folder is no model until all is in place.
        (job.final / "config.json").unlink(missing_ok=True)
        for old in [*job.final.glob("*.safetensors"), *job.final.glob("*.safetensors.index.json")]:
            old.unlink()
        stage.publish_into("config.json")

    staged(job.final, write)
    if job.final.name == HF_SUBFOLDER and not (job.final.parent / HF_SUBFOLDER_ALIAS).exists():
        with contextlib.suppress(OSError):  # a file system without links: the result itself is complete
            (job.final.parent / HF_SUBFOLDER_ALIAS).symlink_to(HF_SUBFOLDER)
    return total


def check_space(folder: Path, nbytes: int) -> None:
    """`InputError` when the file system has less room than the result needs."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise InputError(f"{folder}: needs {human(nbytes)}, {there} has {human(free)} free; choose another --save-dir")


def progress_bar(total: int) -> tqdm:
    """Bytes written, rate and time left, on standard error."""
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="converting", mininterval=0.5)


def human(nbytes: int) -> str:
    """A byte count for people: "1.19 GB"."""
    value, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def report(options: ConvertOptions, job: Job, nbytes: int, seconds: float) -> None:
    """One summary line, and the command that comes next."""
    config = job.source.config
    merged = f" + LoRA r {job.lora.settings.r} alpha {job.lora.settings.alpha:g}" if job.lora else ""
    hf = options.save_model_type == "hf"
    tp, pp = options.target_tensor_parallel_size, options.target_pipeline_parallel_size
    target = "hf" if hf else f"mg TP{tp} PP{pp}"
    print(
        f"converted {config.family} ({config.num_layers} layers, {config.dtype}){merged}: {options.load_model_type} ->"
        f" {target}, {human(nbytes)} in {seconds:.1f} s: {job.final}"
    )
    tokenizer = job.final if hf else job.origin or "TOKENIZER_DIR"
    if hf:
        print(f'next: python inference.py --load {job.final} --tokenizer-name-or-path {tokenizer} --prompt "..."')
        return
    print(
        f"next: torchrun --nproc_per_node {tp * pp} posttrain_gpt.py --stage sft --finetune --load {options.save_dir}"
        f" --save SAVE_DIR --data-path DATA_PREFIX --tokenizer-name-or-path {tokenizer}"
        f" --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    )
