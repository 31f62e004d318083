"""Which rows are trained on, and how they are made into batches."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class DataOptions:
    """Data."""

    data_path: list[str] = option(
        [], help="Prefix of the preprocessed files, without _packed_...; several prefixes are joined.", nargs="*"
    )
    split: str = option(
        "100,0,0",
        help="Shares of the rows for training, validation and test. A row's part follows from its tokens, so that "
        "equal rows stay together.",
        unit="parts",
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
    is_instruction_dataset: bool = option(
        False, help="The rows are prompts with answers: the only kind --stage sft reads, so it need not be given."
    )
    num_workers: int = option(
        0, help="Background threads that prepare batches; 0 prepares them in line.", unit="threads"
    )

    @property
    def lays_out_flat(self) -> bool:
        """Whether a micro-batch is one sequence of rows rather than rows padded to one length."""
        return self.padding_free or self.reset_attention_mask or self.reset_position_ids

    def check(self) -> None:
        """Raise UsageError for shares that cannot be read and lengths below one token."""
        parts = self.split.split(",")
        try:
            shares = [float(p) for p in parts]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
            raise UsageError(f"--split {self.split!r}: expected up to three non-negative shares such as 98,2,0")
        for name in ("seq_length", "pad_to_multiple_of"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.cut_max_seqlen and self.no_cut_token:
            raise UsageError("--cut-max-seqlen cuts long rows and --no-cut-token refuses them; give one of the two")
