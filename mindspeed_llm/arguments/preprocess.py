"""Options of `preprocess_data.py`."""

from dataclasses import dataclass
from typing import ClassVar

from mindspeed_llm.arguments.rows import RowOptions
from mindspeed_llm.arguments.schema import Program, group, option
from mindspeed_llm.arguments.sources import SourceOptions
from mindspeed_llm.arguments.tokenizer import THINKING_MODES, TOKENIZER_TYPES
from mindspeed_llm.errors import UsageError

MOST_SHARDS = 99_999  # their names have five digits


@dataclass
class PreprocessOptions(RowOptions, Program):
    """Make training files from rows: json, jsonl or parquet to <prefix>_packed_*_document.bin and .idx.

    Every row that is dropped or cut is counted by its reason and listed in <prefix>_report.json.
    """

    SCRIPT: ClassVar[str] = "preprocess_data.py"
    EXAMPLE: ClassVar[str] = """
python preprocess_data.py --input ./dataset/alpaca.parquet --output-prefix ./finetune_dataset/alpaca \\
    --tokenizer-name-or-path ./model_from_hf/qwen3_hf --handler-name AlpacaStyleInstructionHandler \\
    --prompt-type qwen3 --enable-thinking true --workers 4
"""

    output_prefix: str | None = option(
        None, help="Path and first part of the name of the files written; folders are made."
    )
    tokenizer_name_or_path: str | None = option(None, help="Folder of the HF tokenizer.")
    prompt_type: str | None = option(
        None, help="Name of the prompt template, e.g. qwen3; hf for the tokenizer's own chat template."
    )
    prompt_type_path: str | None = option(
        None, help="File of prompt templates; left out, configs/finetune/templates.json of this repository."
    )
    enable_thinking: str = option(
        "none",
        help="Thinking mode of templates that have one. true: an answer without a thought is trained to give an empty "
        "one; false: thoughts are removed and an empty one closes the prompt; none: thoughts stay, and an empty one "
        "closes the prompt of answers without.",
        choices=THINKING_MODES,
    )
    pad_to_multiple_of: int = option(1, help="Fill documents of running text up to a multiple of this.", unit="tokens")
    tokenizer_type: str = option("PretrainedFromHF", help="Kind of tokenizer.", choices=TOKENIZER_TYPES)
    seq_length: int | None = option(
        None,
        help="Longest row; longer ones are cut, unless --max-length says otherwise. Left out, rows keep their length.",
        unit="tokens",
    )
    log_interval: int = option(100, help="Rows between log lines, at most one a second.", unit="rows")
    split: str | None = option(
        None,
        help="Shares such as 95,5,0 for <prefix>_train, _valid and _test. A row's part follows from its content, so "
        "that equal rows stay together; left out, nothing is divided.",
    )
    num_shards: int = option(
        1,
        help="Parts in which the rows are made, unpacked, before they are merged; made ones are not made again.",
        unit="parts",
    )
    shard_index: int | None = option(
        None, help="Make only this part, from 0, e.g. on a machine of its own; --merge-group-keys merges them later."
    )
    merge_group_keys: list[str] = option(
        [],
        help="Merge the files of the folder --input whose names hold one of these words, e.g. "
        "packed_input_ids_document; parts made by --num-shards are divided and packed as well.",
        nargs="+",
    )
    preview: int = option(0, help="Print so many rows as the model gets them, trained tokens marked; write nothing.")
    inspect: str | None = option(
        None, help="Output prefix of existing files: print their rows likewise, --preview of them (10 when left out)."
    )
    seed: int = option(1234, help="Seed where rows are mixed or sampled.")
    overwrite: bool = option(False, help="Replace existing files of the same prefix.")
    sources: SourceOptions = group(SourceOptions)

    def check(self) -> None:
        """Raise UsageError for counts below one and for options that need others or contradict them."""
        super().check()
        self.check_counts("log_interval", "seq_length", "num_shards", "pad_to_multiple_of")
        if self.num_shards > MOST_SHARDS:
            raise UsageError(f"--num-shards {self.num_shards}: must be at most {MOST_SHARDS}")
        self._check_mode()
        self._check_lengths()
        if self.inspect is None:
            self.sources.check_used(self.input, self.handler_name)
        if self.mask_history and self.train_on_prompt:
            raise UsageError("--mask-history trains only the last answer, --train-on-prompt everything; give one")

    def _check_lengths(self) -> None:
        """Raise UsageError for lengths that have no effect, and for packing without its length."""
        if self.pack and self.seq_length is None:
            raise UsageError("--pack needs --seq-length, the length of the joined sequences")
        if self.neat_pack and not self.pack:
            raise UsageError("--neat-pack needs --pack")
        if self.max_length is None:
            if self.truncation_strategy != "delete":
                raise UsageError(
                    f"--truncation-strategy {self.truncation_strategy} needs --max-length, the longest row"
                )
        elif self.compat is not None:
            raise UsageError("--max-length is not upstream's; with --compat upstream give --seq-length")
        elif self.seq_length is not None and self.max_length > self.seq_length:
            raise UsageError(
                f"--max-length {self.max_length} is above --seq-length {self.seq_length}; give at most that, or one of "
                "the two"
            )

    def _check_mode(self) -> None:
        """Raise UsageError unless the options name one thing to do, and what it needs."""
        if self.preview < 0:
            raise UsageError(f"--preview {self.preview}: must not be negative")
        if self.inspect is not None:
            if self.input is not None or self.sources.dataset:
                raise UsageError("--inspect prints files that exist; leave --input and --dataset out")
            return
        if (self.input is None) == (not self.sources.dataset):
            given = "neither is" if self.input is None else "both are"
            raise UsageError(f"--input or --dataset names the rows, {given} given; give one of the two")
        needed = {"--output-prefix": self.output_prefix is None and not self.preview}
        needed["--tokenizer-name-or-path"] = self.tokenizer_name_or_path is None and not self.merge_group_keys
        for flag, missing in needed.items():
            if missing:
                raise UsageError(f"{flag} is required")
        if self.merge_group_keys and self.input is None:
            raise UsageError("--merge-group-keys needs --input, the folder of the files to merge")
        if self.merge_group_keys and (self.num_shards > 1 or self.shard_index is not None or self.preview):
            raise UsageError(
                "--merge-group-keys merges parts that are there; leave --num-shards, --shard-index and --preview out"
            )
        if self.shard_index is not None and self.num_shards == 1 and "num_shards" not in self.parsed.given:
            raise UsageError("--shard-index needs --num-shards, the number of parts")
        if self.shard_index is not None and not 0 <= self.shard_index < self.num_shards:
            raise UsageError(f"--shard-index {self.shard_index}: must be 0 to {self.num_shards - 1} (--num-shards)")
