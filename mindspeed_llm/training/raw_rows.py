"""Options that follow from the rows: those that prepare raw ones, where these then lie, how files are laid out."""

import os
from dataclasses import fields, replace
from pathlib import Path

from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.arguments.rows import RowOptions
from mindspeed_llm.data.division import PARTS, split_shares
from mindspeed_llm.data.prefixes import Parts
from mindspeed_llm.data.sources import parse_spec
from mindspeed_llm.errors import InputError

CACHE = ".data_cache"  # hidden, so that no search for rows finds it


def preprocess_options(options: PosttrainOptions, tokenizer: str) -> PreprocessOptions:
    """The options of `preprocess_data.py` that make the rows of this run.

    Only packing takes --seq-length: other rows keep their length in the files, and batches cut them.
    """
    rows, said = options.rows, options.tokenizer
    made = PreprocessOptions(
        **{one.name: getattr(rows, one.name) for one in fields(RowOptions)},
        sources=options.sources,
        tokenizer_name_or_path=tokenizer,
        tokenizer_type=said.tokenizer_type,
        prompt_type=said.prompt_type,
        prompt_type_path=said.prompt_type_path,
        enable_thinking=said.enable_thinking or "none",
        seq_length=options.data.seq_length if rows.pack else None,
        split=options.data.split if options.data.divides else None,
        seed=options.training.seed,
    )
    replace(made, output_prefix="checked").check()
    return made


def data_of(options: PosttrainOptions, prefix: Path) -> DataOptions:
    """The data options of prepared files that raw rows have become."""
    if not options.data.divides:
        return replace(options.data, data_path=[str(prefix)], split="100,0,0")
    there = [part for part, share in zip(PARTS, split_shares(options.data.split), strict=True) if share]
    paths = {f"{part}_data_path": [f"{prefix}_{part}"] for part in there}
    return replace(options.data, data_path=[], split="100,0,0", **paths)


def raw_folder(options: PosttrainOptions) -> Path | None:
    """The folder in which the first file or folder of raw rows lies; None when none lies on this machine."""
    if options.sources.dataset_dir is not None:
        return Path(options.sources.dataset_dir).expanduser()
    named = [options.rows.input] if options.rows.input else [parse_spec(s).path for s in options.sources.dataset]
    there = [Path(name).expanduser() for name in named if name and Path(name).expanduser().exists()]
    return there[0].resolve().parent if there else None


def cache_place(options: PosttrainOptions, beside: Path | None) -> Path:
    """Where that folder is or will be."""
    if options.data.data_cache_dir:
        return Path(options.data.data_cache_dir).expanduser()
    places = [*([beside] if beside is not None else []), Path(options.checkpoint.save or ".").resolve().parent]
    return next((place for place in places if os.access(place, os.W_OK)), places[-1]) / CACHE


def cache_folder(options: PosttrainOptions, beside: Path | None) -> Path:
    """The folder for what is computed once: the option's, or one beside the data, or one beside --save.

    Raises:
        InputError: it cannot be written to.
    """
    chosen = cache_place(options, beside)
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        writable = os.access(chosen, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"cannot write to {chosen}; name another folder with --data-cache-dir")
    return chosen.resolve()


def with_bounds_kept(options: PosttrainOptions, parts: Parts) -> PosttrainOptions:
    """The options with what the data ask for: files made with --neat-pack are laid out flat, row by row.

    There, and where a row holds a single text, --reset-attention-mask and --reset-position-ids have nothing to add.
    """
    data = options.data
    neat = any(file.neat_packed for file in parts.files)
    if neat:
        data = replace(data, padding_free=True)
    if neat or not any(file.may_be_packed for file in parts.files):
        data = replace(data, reset_attention_mask=False, reset_position_ids=False)
    return replace(options, data=data)
