"""Where the rows of a run come from, when it is more than one file or folder."""

import re
from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

ENTRIES = "LlamaFactoryInstructionHandler"
SELF_COGNITION = re.compile(r"(^|/)self[-_]cognition(#\d+)?$", re.IGNORECASE)


@dataclass
class SourceOptions:
    """Sources."""

    dataset: list[str] = option(
        [],
        help="Several sources instead of --input, each path[:subset][#count]: a file, a folder, an id on the Hugging "
        "Face hub, or self-cognition. The count draws rows by --seed; beyond the source's size it repeats them. "
        "Without --handler-name the columns of each source tell its format.",
        nargs="*",
    )
    mix_strategy: str = option(
        "concat",
        help="concat: one source after the other; interleave_under: mixed until the first is used up; "
        "interleave_over: until all are, smaller ones repeated.",
        choices=("concat", "interleave_under", "interleave_over"),
    )
    interleave_probs: list[str] = option(
        [], help="Shares of the sources in an interleaved mixture; left out, equal ones.", nargs="*"
    )
    dataset_dir: str | None = option(
        None, help="For LlamaFactoryInstructionHandler: folder of dataset_info.json, whose entries --input names."
    )
    max_samples: int | None = option(
        None, help="For LlamaFactoryInstructionHandler: rows drawn of each entry at most.", unit="rows"
    )
    model_name: list[str] = option(
        [], help="For self-cognition: the model's name, or two names (Chinese, English).", nargs="*"
    )
    model_author: list[str] = option([], help="For self-cognition: its maker, one or two likewise.", nargs="*")

    def check_used(self, single: str | None, handler: str | None) -> None:
        """Raise UsageError for options of sources that the run does not have.

        Args:
            single: `--input`.
            handler: `--handler-name`.
        """
        entries = handler == ENTRIES
        built_in = any(SELF_COGNITION.search(word) for word in self.dataset)
        unused = {
            "--model-name": (self.model_name and not built_in, "fills the source self-cognition; name it in --dataset"),
            "--model-author": (self.model_author and not built_in, "fills self-cognition; name it in --dataset"),
            "--max-samples": (self.max_samples and not entries, f"belongs to {ENTRIES}; write --dataset PATH#COUNT"),
            "--dataset-dir": (self.dataset_dir and not entries, f"belongs to --handler-name {ENTRIES}"),
            "--mix-strategy": (
                self.mix_strategy != "concat" and single is not None and not entries,
                "mixes several sources; name them with --dataset",
            ),
            "--interleave-probs": (
                self.interleave_probs and single is not None and not entries,
                "are shares of several sources; name them with --dataset",
            ),
        }
        for flag, (given, why) in unused.items():
            if given:
                raise UsageError(f"{flag} {why}")
        if self.max_samples is not None and self.max_samples < 1:
            raise UsageError(f"--max-samples {self.max_samples}: must be at least 1")

    def weights(self) -> list[float]:
        """The values of --interleave-probs, which may be joined by commas. Raises UsageError."""
        words = ",".join(self.interleave_probs).split(",") if self.interleave_probs else []
        try:
            return [float(word) for word in words]
        except ValueError as error:
            given = " ".join(self.interleave_probs)
            raise UsageError(f"--interleave-probs {given}: expected numbers such as 0.7,0.3") from error
