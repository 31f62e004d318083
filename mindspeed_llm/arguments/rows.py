"""How raw rows become samples: the same options in preprocessing and inside training."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class RowOptions:
    """Raw rows."""

    input: str | None = option(
        None, help="File of rows, or a folder of such files; with --merge-group-keys the folder of the files to merge."
    )
    handler_name: str | None = option(
        None, help="How a row is read, e.g. AlpacaStyleInstructionHandler; left out, rows are running text."
    )
    map_keys: str | None = option(
        None, help='Columns of the rows as JSON, e.g. {"prompt":"question","response":"answer","history":"history"}.'
    )
    json_keys: list[str] = option(
        ["text"], help="Columns of running text, each written to files of its own.", nargs="+"
    )
    dataset_additional_keys: list[str] = option(
        [], help="For the R1 handlers: columns that become fields of their own; labels is the last answer.", nargs="*"
    )
    compat: str | None = option(
        None,
        help="upstream: its tokens, slot by slot, with its cutting, packing order and treatment of bad rows.",
        choices=("upstream",),
    )
    allow_control_tokens: bool = option(
        False, help="Let text of users, systems and tools that spells a control token become that token."
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
    mask_history: bool = option(
        False,
        help="Train only the last answer of a conversation; earlier ones stand before it as in a prompt.",
    )
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

    def check(self) -> None:
        """Raise UsageError for counts below one."""
        self.check_counts("workers", "n_subs", "max_length", "max_chars_per_row")

    def check_counts(self, *names: str) -> None:
        """Raise UsageError where one of these options is given and below one."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
