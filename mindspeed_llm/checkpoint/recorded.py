"""What a checkpoint remembers besides tensors: where its tokenizer lies, which template it was tuned with."""

from pathlib import Path

from mindspeed_llm.arguments.tokenizer import TokenizerOptions
from mindspeed_llm.checkpoint.metadata import Metadata
from mindspeed_llm.checkpoint.open import BaseSource, LoraSource
from mindspeed_llm.errors import UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def tokenizer_folder(options: TokenizerOptions, base: BaseSource) -> str | None:
    """Where the tokenizer lies: the option, the HF folder itself, or the HF folder its conversion recorded."""
    if options.tokenizer_name_or_path:
        return options.tokenizer_name_or_path
    metadata = getattr(base, "metadata", None)
    places = [str(base.path)] + ([metadata.base.path] if metadata and metadata.base else [])
    return next((place for place in places if holds_tokenizer(place)), None)


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def recorded_template(
    options: TokenizerOptions, base: BaseSource, adapter: LoraSource | None
) -> tuple[str | None, str]:
    """(template name, thinking mode) to prompt with: what the checkpoint was tuned with, else what the flags say.

    Raises:
        UsageError: a flag contradicts the record; both values are named.
    """
    metadata: Metadata | None = adapter.metadata if adapter is not None else getattr(base, "metadata", None)
    name = metadata.template if metadata else None
    thinking = metadata.enable_thinking if metadata else None
    if name and options.prompt_type and options.prompt_type != name:
        raise UsageError(
            f"--prompt-type {options.prompt_type}: the checkpoint was tuned with {name}; leave the flag out"
        )
    # an adapter tuned on mixed rows ("none") answers in either mode
    if thinking not in (None, "none") and options.enable_thinking not in (None, thinking):
        raise UsageError(
            f"--enable-thinking {options.enable_thinking}: the checkpoint was tuned with {thinking}; leave the flag out"
        )
    return name or options.prompt_type, options.enable_thinking or thinking or "none"
