"""Options of `preprocess_data.py`."""

from dataclasses import dataclass
from typing import ClassVar

from mindspeed_llm.arguments.schema import Program, option
from mindspeed_llm.arguments.tokenizer import THINKING_MODES, TOKENIZER_TYPES
from mindspeed_llm.errors import UsageError


@dataclass
class PreprocessOptions(Program):
    """Make training files from rows: json, jsonl or parquet to <prefix>_packed_*_document.bin and .idx.

    Every row that is dropped or cut is counted by its reason and listed in <prefix>_report.json.
    """

    SCRIPT: ClassVar[str] = "preprocess_data.py"
    EXAMPLE: ClassVar[str] = """
python preprocess_data.py --input ./dataset/alpaca.parquet --output-prefix ./finetune_dataset/alpaca \\
    --tokenizer-name-or-path ./model_from_hf/qwen3_hf --handler-name AlpacaStyleInstructionHandler \\
    --prompt-type qwen3 --enable-thinking true --workers 4
"""

    input: str = option(help="File of rows, or a folder of such files.")
    output_prefix: str = option(help="Path and first part of the name of the files written; folders are made.")
    tokenizer_name_or_path: str = option(help="Folder of the HF tokenizer.")
    handler_name: str = option(help="How a row is read, e.g. AlpacaStyleInstructionHandler.")
    prompt_type: str | None = option(None, help="Name of the prompt template, e.g. qwen3.")
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
    map_keys: str | None = option(
        None, help='Columns of the rows as JSON, e.g. {"prompt":"question","response":"answer","history":"history"}.'
    )
    tokenizer_type: str = option("PretrainedFromHF", help="Kind of tokenizer.", choices=TOKENIZER_TYPES)
    seq_length: int | None = option(
        None, help="Longest row; longer ones are cut. Left out, rows keep their length.", unit="tokens"
    )
    max_length: int | None = option(
        None, help="Longest row; what becomes of a longer one says --truncation-strategy.", unit="tokens"
    )
    truncation_strategy: str = option(
        "delete",
        help="Rows longer than --max-length: delete leaves them out, left cuts their beginning off, right their end.",
        choices=("delete", "left", "right"),
    )
    system: str | None = option(None, help="System text of rows that bring none.")
    mask_history: bool = option(False, help="Train only the last answer of a conversation.")
    train_on_prompt: bool = option(False, help="Train prompts too, not only answers.")
    on_bad_row: str = option(
        "auto",
        help="Rows that cannot be used. error: stop at the first; skip: pass over, count and list them; auto: skip, "
        "but refuse the input when more than 1 % of its rows and at least 10 are bad.",
        choices=("auto", "error", "skip"),
    )
    max_chars_per_row: int = option(
        2_000_000, help="Rows with more text are left out before they are tokenised.", unit="characters"
    )
    append_eod: bool = option(False, help="Add the end-of-document token after each row.")
    pack: bool = option(False, help="Join rows into sequences of --seq-length.")
    neat_pack: bool = option(False, help="With --pack: number the joined rows in the attention mask.")
    workers: int = option(1, help="Processes that tokenise; the result does not depend on it.", unit="processes")
    n_subs: int = option(1, help="Parts that --pack packs each on its own.", unit="parts")
    log_interval: int = option(100, help="Rows between log lines, at most one a second.", unit="rows")
    seed: int = option(1234, help="Seed where rows are mixed or sampled.")
    overwrite: bool = option(False, help="Replace existing files of the same prefix.")

    def check(self) -> None:
        """Raise UsageError for counts below one and packing without its length."""
        for name in ("workers", "n_subs", "log_interval", "seq_length", "max_length", "max_chars_per_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.pack and self.seq_length is None:
            raise UsageError("--pack needs --seq-length, the length of the joined sequences")
        if self.neat_pack and not self.pack:
            raise UsageError("--neat-pack needs --pack")
