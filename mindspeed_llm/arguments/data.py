"""Which rows are trained on, and how they are made into batches."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class DataOptions:
    """Data."""

    data_path: list[str] = option(
        [],
        help="Prefix of the preprocessed files, without _packed_...; several are joined, or mixed in shares where each "
        "has a weight before it: 0.3 FIRST 0.7 SECOND. A prefix that --split of preprocess_data.py has divided stands "
        "for its parts.",
        nargs="*",
    )
    train_data_path: list[str] = option([], help="Prefixes to train on, instead of --data-path.", nargs="*")
    valid_data_path: list[str] = option([], help="With --train-data-path: prefixes to validate on.", nargs="*")
    test_data_path: list[str] = option([], help="With --train-data-path: prefixes to test on at the end.", nargs="*")
    split: str = option(
        "100,0,0",
        help="Shares of the rows for training, validation and test. A row's part follows from its tokens, so that "
        "equal rows stay together.",
        unit="parts",
    )
    data_cache_dir: str | None = option(
        None,
        help="Folder for what is computed once: files made from raw rows, orders of large data sets. Left out, "
        ".data_cache beside the data, or beside --save where nothing can be written there.",
    )
    no_shared_storage: bool = option(
        False, help="The nodes share no file system: the first process of each makes the files of --data-cache-dir."
    )
    seq_length: int = option(4096, help="Longest row; longer ones are cut (and counted).", unit="tokens")
    no_pad_to_seq_lengths: bool = option(
        False, help="Pad each micro-batch to its own longest row instead of --seq-length: same losses, less work."
    )
    pad_to_multiple_of: int = option(
        8, help="With --no-pad-to-seq-lengths: round the padded length up to this multiple.", unit="tokens"
    )
    padding_free: bool = option(
        False,
        help="Lay the rows of a micro-batch one behind the other instead of padding them; attention and positions "
        "start anew at each row: same losses, no work for padding. Files made with --neat-pack always are.",
    )
    reset_attention_mask: bool = option(
        False,
        help="In files made with --pack, let no token see beyond the end-of-text token before it. Files made with "
        "--neat-pack need no such flag, and their bounds are the rows' own even where turns end with that token.",
    )
    reset_position_ids: bool = option(
        False, help="In files made with --pack, count positions anew behind every end-of-text token."
    )
    cut_max_seqlen: bool = option(
        False, help="Cut a long row at --seq-length; left out, prompt and answer of each turn are cut in proportion."
    )
    no_cut_token: bool = option(False, help="Refuse rows longer than --seq-length instead of cutting them.")
    no_shuffle: bool = option(False, help="Keep the rows' order; left out, each epoch is shuffled by --seed.")
    length_grouping: bool = option(
        False, help="With --no-pad-to-seq-lengths: global batches of rows of like length, so that less is padded."
    )
    is_instruction_dataset: bool = option(
        False, help="The rows are prompts with answers: the only kind --stage sft reads, so it need not be given."
    )
    is_pairwise_dataset: bool = option(
        False, help="The rows are pairs of answers: the only kind --stage dpo reads, so it need not be given."
    )
    num_workers: int = option(
        1, help="Background threads that prepare the next global batch; 0 prepares it in line.", unit="threads"
    )

    @property
    def divides(self) -> bool:
        """Whether --split asks for validation or test rows."""
        return any(float(share) for share in self.split.split(",")[1:])

    @property
    def lays_out_flat(self) -> bool:
        """Whether a micro-batch is one sequence of rows rather than rows padded to one length."""
        return self.padding_free or self.reset_attention_mask or self.reset_position_ids

    def check(self) -> None:
        """Raise UsageError for shares that cannot be read, lengths below one token and data named twice."""
        parts = self.split.split(",")
        try:
            shares = [float(p) for p in parts]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
            raise UsageError(f"--split {self.split!r}: expected up to three non-negative shares such as 98,2,0")
        for name, least in (("seq_length", 1), ("pad_to_multiple_of", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.cut_max_seqlen and self.no_cut_token:
            raise UsageError("--cut-max-seqlen cuts long rows and --no-cut-token refuses them; give one of the two")
        if self.length_grouping and not (self.no_pad_to_seq_lengths or self.lays_out_flat):
            raise UsageError("--length-grouping needs --no-pad-to-seq-lengths: rows padded to --seq-length are alike")
        if self.length_grouping and self.no_shuffle:
            raise UsageError("--length-grouping chooses the rows' order and --no-shuffle keeps it; give one of the two")
        self._check_paths()

    def _check_paths(self) -> None:
        """Raise UsageError unless the prefixes of every purpose are named in one way."""
        if self.data_path and self.train_data_path:
            raise UsageError("--data-path and --train-data-path both name the rows to train on; give one of the two")
        held = [flag for flag in ("valid_data_path", "test_data_path") if getattr(self, flag)]
        if held and not self.train_data_path:
            raise UsageError(f"--{held[0].replace('_', '-')} needs --train-data-path, in place of --data-path")
        if self.train_data_path and self.divides:
            raise UsageError(f"--split {self.split} divides --data-path; with --train-data-path use --valid-data-path")
