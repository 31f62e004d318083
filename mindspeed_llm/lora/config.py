"""LoRA settings: what is adapted, how strongly; recorded in every checkpoint so that nobody retypes them."""

from dataclasses import dataclass
from typing import Any

from mindspeed_llm.errors import UsageError, unknown

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
DEFAULT_RANK = 16
DEFAULT_ALPHA = 32


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation Y = X W^T + (alpha / r) (X A^T) B^T (Hu et al., arXiv 2106.09685).

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: numerator of the scaling.
        targets: megatron-core names of the adapted linear layers.
        dropout: probability on the adapter's input; 0 yet.
    """

    rank: int = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"--lora-r must be at least 1, not {self.rank}")
        for target in self.targets:
            if target not in TARGETS:
                raise unknown("--lora-target-modules entry", target, TARGETS)
        if not self.targets:
            raise UsageError(f"--lora-target-modules is empty; known: {' '.join(TARGETS)}")

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """The form stored in a checkpoint's args.json."""
        return {"r": self.rank, "alpha": self.alpha, "target_modules": list(self.targets), "dropout": self.dropout}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "LoraSettings":
        """Read `to_dict`'s form."""
        return cls(stored["r"], stored["alpha"], tuple(stored["target_modules"]), stored.get("dropout") or 0.0)


def settings_from_options(options: Any, recorded: dict[str, Any] | None, where: str = "") -> LoraSettings | None:
    """The settings of this run from `LoraOptions` and what a loaded adapter recorded; None = no LoRA.

    Flags that were given must agree with the record: an adapter trained with alpha 32 and read as 16 is a silently
    different model.

    Raises:
        UsageError: a flag contradicts the record; both values and `where` the record lies are named.
    """
    given = {"r": options.lora_r, "alpha": options.lora_alpha, "target_modules": options.lora_target_modules}
    if recorded is None:
        if not options.lora_target_modules:
            return None
        return LoraSettings(
            DEFAULT_RANK if options.lora_r is None else options.lora_r,
            DEFAULT_ALPHA if options.lora_alpha is None else options.lora_alpha,
            tuple(dict.fromkeys(options.lora_target_modules)),
            options.lora_dropout or 0.0,
        )
    settings = LoraSettings.from_dict(recorded)
    flags = {"r": "--lora-r", "alpha": "--lora-alpha", "target_modules": "--lora-target-modules"}
    for key, value in given.items():
        stored = recorded[key]
        same = set(value) == set(stored) if isinstance(value, list) and value else value == stored
        if value not in (None, []) and not same:
            raise UsageError(f"{flags[key]} {value} contradicts {stored} recorded in {where}; leave the flag out")
    return settings
