"""`convert_ckpt.py`: between HF folders and Megatron checkpoints of any layout, merging an adapter on the way.

    open the source -> wrap it (merge, cast) -> write it block by block into a staged folder -> publish

The source's own layout, sizes and adapter settings are read from its files; flags about them are only checked.
"""

import contextlib
import functools
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.checkpoint.adapters.peft_config import FILE as PEFT_CONFIG
from mindspeed_llm.checkpoint.adapters.peft_folder import write_base_record
from mindspeed_llm.checkpoint.adapters.servers import describe_servers
from mindspeed_llm.checkpoint.convert_job import HF_SUBFOLDER, ITERATION, Job, prepare, with_formats
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource, copy_companions
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import BaseRecord, Metadata, write_metadata
from mindspeed_llm.checkpoint.open import source_hash
from mindspeed_llm.checkpoint.result import ended_by_signals, staged
from mindspeed_llm.checkpoint.sizes import check_space, free_space, human, progress_bar
from mindspeed_llm.checkpoint.targets import HfFolder, PeftFolder, RankFiles, peak_memory

HF_SUBFOLDER_ALIAS = "mg2hf"
"""Upstream's documents and scripts say mg2hg, its program wrote mg2hf; the second is a link to the first."""


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status: 0, or 1 when the result was compared and is not the same model.

    Raises:
        UsageError: flags that contradict each other, the model or the adapter.
        InputError: a source that is missing, damaged or does not fit, or a result that cannot be written.
    """
    options = with_formats(parse(ConvertOptions, argv, ConvertOptions.SCRIPT))
    started = time.monotonic()
    job = prepare(options)
    if options.dry_run:
        show_plan(job)
        return 0
    total = sum(row.nbytes for row in job.target.rows(job.source))
    check_space(job.final, total)
    for note in job.notes:
        print(note, file=sys.stderr)
    write = {HfFolder: to_hf, PeftFolder: to_peft}.get(type(job.target), to_megatron)
    with one_thread(), ended_by_signals():
        write(job, total)
    report(job, total, time.monotonic() - started)
    return compare(job, options) if options.test_convert_precision else 0


def compare(job: Job, options: ConvertOptions) -> int:
    """The gate (`--test-convert-precision true`): the exit status is 0 only when every check was made and passed."""
    from mindspeed_llm.checkpoint.verify.gate import run_gate  # transformers and megatron-core: only when asked for

    return 0 if run_gate(job, options).status == "PASS" else 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: blocks are so small that waking others for a copy takes longer than the copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def show_plan(job: Job) -> None:
    """Print every tensor of the result with its origin, shape and bytes, then what the conversion takes."""
    total, count = 0, 0
    files: dict[str, int] = {}
    for row in job.target.rows(job.source):
        origin = ", ".join(dict.fromkeys(name for logical in row.names for name in origin_names(job, logical)))
        shape = "x".join(map(str, row.shape)) or "scalar"
        print(f"{row.file}  {row.key}  {shape} {str(row.dtype).removeprefix('torch.')}  {row.nbytes}  <- {origin}")
        files[row.file] = files.get(row.file, 0) + row.nbytes
        total, count = total + row.nbytes, count + 1
    print(
        f"dry run: {count} tensors in {len(files)} files of at most {human(max(files.values()))}, {human(total)} in"
        f" all, about {peak_memory(job.source, job.target) >> 20} MiB of memory: {job.final}"
    )
    if (free := free_space(job.final)) < total:
        print(f"dry run: {job.final} has room for {human(free)} only")


def origin_names(job: Job, logical: str) -> list[str]:
    """Names of what a logical tensor is read from."""
    if job.adapter_only:
        return [f"{job.lora.path}: {logical}"]
    if isinstance(job.base, HFSource):
        return [str(hf) for hf in job.source.table.entry(logical).hf]
    if isinstance(job.base, TorchDistSource):
        return [logical]
    return [f"{part.path.parent.name}:{logical}" for part in job.base.stored(logical).parts]


def to_megatron(job: Job, total: int) -> None:
    """Write a Megatron checkpoint and point the tracker at it."""

    def write(folder: Path) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool, progress_bar(total) as bar:
            # One thread hashes while this one copies: more would take the copy's processor and the interpreter lock.
            hash_of = source_hash if job.adapter_only else functools.partial(content_hash, threads=1)
            hashed = pool.submit(hash_of, job.base if job.adapter_only else job.source, stopped=stop.is_set)
            try:
                job.target.write(job.source, folder, bar.update)
                write_metadata(folder, describe(job, hashed))
            finally:
                stop.set()

    staged(job.final, True, job.overwrite, write, ITERATION)


def describe(job: Job, hashed: "Future[str]") -> Metadata:
    """The args.json of a conversion: an unchanged model's base is the HF folder it came from."""
    if job.adapter_only:
        base, about = BaseRecord(str(job.base.path.resolve()), hashed.result()), job.lora.metadata
        told = (about.template, about.enable_thinking) if about else (None, None)
        return Metadata(job.base.config, job.target.layout, ITERATION, None, base, job.lora.live_settings, *told)
    recorded = job.base.metadata.base if not isinstance(job.base, HFSource) and job.base.metadata else None
    if isinstance(job.base, HFSource):
        unchanged = job.source is job.base
        recorded = BaseRecord(str(job.base.path.resolve()), hashed.result() if unchanged else source_hash(job.base))
    elif recorded is None and job.origin is not None:
        recorded = BaseRecord(str(job.origin.resolve()), None)
    config = job.source.config
    layout = job.target.layout if isinstance(job.target, RankFiles) else Layout.create(config.num_layers)
    return Metadata(config, layout, ITERATION, hashed.result(), recorded)


def to_hf(job: Job, total: int) -> None:
    """Write an HF folder with config, tokenizer and chat template; other files that lie there stay."""

    def write(folder: Path) -> None:
        with progress_bar(total) as bar:
            job.target.write(job.source, folder, bar.update)
        copy_companions(job.origin, folder, job.source.config)

    staged(job.final, False, job.overwrite, write)
    if job.final.name == HF_SUBFOLDER and not (job.final.parent / HF_SUBFOLDER_ALIAS).exists():
        with contextlib.suppress(OSError):  # a file system without links: the result itself is complete
            (job.final.parent / HF_SUBFOLDER_ALIAS).symlink_to(HF_SUBFOLDER)


def to_peft(job: Job, total: int) -> None:
    """Write a PEFT folder, and say which servers take it."""

    def write(folder: Path) -> None:
        job.target.write(job.source, folder, lambda nbytes: None)
        print(describe_servers(json.loads((folder / PEFT_CONFIG).read_text())))
        write_base_record(folder, BaseRecord(job.target.base_path, source_hash(job.base)))

    staged(job.final, False, job.overwrite, write)


def report(job: Job, nbytes: int, seconds: float) -> None:
    """One summary line, and the command that comes next."""
    config, target = job.source.config, job.target
    merged = f" + LoRA r {job.lora.settings.r} alpha {job.lora.settings.alpha:g}" if job.lora else ""
    if job.adapter_only:
        kind = "PEFT" if isinstance(target, PeftFolder) else f"mg {target.layout}"
        print(
            f"converted a LoRA adapter of {config.family} (r {job.lora.settings.r} alpha {job.lora.settings.alpha:g}):"
            f" {job.lora.path} -> {kind}, {human(nbytes)} in {seconds:.1f} s: {job.final}"
        )
        return
    megatron = not isinstance(target, HfFolder)
    layout = target.layout if isinstance(target, RankFiles) else Layout.create(config.num_layers)
    told = f"mg {layout}" if isinstance(target, RankFiles) else "mg torch_dist" if megatron else "hf"
    origin = "hf" if isinstance(job.base, HFSource) else "mg"
    print(
        f"converted {config.family} ({config.num_layers} layers, {config.dtype}){merged}: {origin} ->"
        f" {told}, {human(nbytes)} in {seconds:.1f} s: {job.final}"
    )
    print(f"next: {next_command(job, layout)}")


def next_command(job: Job, layout: Layout) -> str:
    """A command that uses the result: training, or for a model with experts and for an HF folder generation."""
    quoted = functools.partial(map, lambda word: shlex.quote(str(word)))
    if isinstance(job.target, HfFolder):
        load, tokenizer = quoted([job.final, job.final])
        return f'python inference.py --load {load} --tokenizer-name-or-path {tokenizer} --prompt "..."'
    load, tokenizer = quoted([job.final.parent, job.origin or "TOKENIZER_DIR"])
    words = f"--load {load} --tokenizer-name-or-path {tokenizer}"
    words += f" --tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp}"
    launch = f"torchrun --nproc_per_node {layout.world_size}"
    if not job.source.config.num_experts:
        return f"{launch} posttrain_gpt.py --stage sft --finetune {words} --save SAVE_DIR --data-path DATA_PREFIX"
    ep, etp = (layout.ep * layout.tp, 1) if layout.tp_extends_ep else (layout.ep, layout.etp)
    words += f" --expert-model-parallel-size {ep} --expert-tensor-parallel-size {etp}"
    return f'{launch} inference.py {words} --prompt "..."'
