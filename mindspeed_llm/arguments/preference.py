"""What is learnt from pairs of a chosen and a rejected answer."""

from dataclasses import dataclass, fields

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

SMOOTHED = ("sigmoid", "robust")  # the losses in which a pair may have been labelled the wrong way round


@dataclass
class PreferenceOptions:
    """Preference."""

    dpo_beta: float = option(
        0.1, help="Of --stage dpo: how strongly the model is held to the base; larger moves less. The tau of IPO."
    )
    dpo_loss_type: str = option(
        "sigmoid",
        help="Loss of a pair: sigmoid (DPO), hinge (SLiC), ipo (squared distance of per-token means), robust (sigmoid "
        "without bias under flipped labels).",
        choices=("sigmoid", "hinge", "ipo", "robust"),
    )
    dpo_label_smoothing: float = option(
        0.0, help="Share of pairs whose labels are expected to be flipped, below 0.5; for sigmoid and robust."
    )
    pref_ftx: float = option(
        0.0, help="Weight of the chosen answer's own loss: mean over its tokens, added to each pair's."
    )

    def check(self) -> None:
        """Raise UsageError for values without a meaning, and for a smoothing that the loss does not have."""
        if not self.dpo_beta > 0:
            raise UsageError(f"--dpo-beta {self.dpo_beta}: must be above 0")
        if not 0 <= self.dpo_label_smoothing < 0.5:
            raise UsageError(f"--dpo-label-smoothing {self.dpo_label_smoothing}: must be at least 0 and below 0.5")
        if self.dpo_label_smoothing and self.dpo_loss_type not in SMOOTHED:
            raise UsageError(
                f"--dpo-label-smoothing {self.dpo_label_smoothing}: --dpo-loss-type {self.dpo_loss_type} knows no "
                f"flipped labels; leave it out, or use {' or '.join(SMOOTHED)}"
            )
        if not self.pref_ftx >= 0:
            raise UsageError(f"--pref-ftx {self.pref_ftx}: must not be negative")

    def given(self) -> list[str]:
        """Flags that differ from their defaults."""
        return [f"--{one.name.replace('_', '-')}" for one in fields(self) if getattr(self, one.name) != one.default]
