"""What is worked out before training: layouts that fit, and whether this one does."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

CARDS = ("ascend-910b", "ascend-910c", "a100", "h100", "h200", "cpu")


@dataclass
class PlanOptions:
    """Plan."""

    plan: bool = option(
        False,
        help="Train nothing: print memory, communication and step time of layouts for --cards, best first, with the "
        "options that make them. Sizes given are kept. One process, no accelerator, seconds.",
    )
    cards: int | None = option(None, help="With --plan: cards of the job, over all nodes.", unit="cards")
    card: str = option(CARDS[0], help="With --plan: kind of card; its figures are published ones.", choices=CARDS)
    card_memory: str | None = option(
        None, help="With --plan: memory of a card, as 64GiB or 80GB; left out, that of --card."
    )
    card_tflops: float | None = option(
        None,
        help="With --plan: rate that a card reaches in products of training; left out, half of its published peak.",
        unit="TFLOP/s",
    )
    link_gbps: float | None = option(
        None, help="With --plan: rate of a card's links, in and between nodes; left out, published.", unit="Gbit/s"
    )
    plan_rows: int = option(10, help="With --plan: layouts printed.", unit="layouts")
    dry_run: bool = option(
        False,
        help="Build everything, train one step, save nothing; print each rank's measured peak of live tensors beside "
        "the prediction.",
    )
    no_memory_check: bool = option(
        False, help="Build the model even where the prediction exceeds the device's memory (on a CPU: free RAM)."
    )

    def check(self) -> None:
        """Raise UsageError for a plan without cards, sizes that are not positive, and two ways not to train at once."""
        if self.plan and self.cards is None:
            raise UsageError("--plan needs --cards, the number of cards of the job")
        if self.plan and self.dry_run:
            raise UsageError("--plan computes and --dry-run runs a step; give one of the two")
        for name in ("cards", "card_tflops", "link_gbps", "plan_rows"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be positive")
        if not self.plan and self.cards is not None:
            raise UsageError(
                f"--cards {self.cards} is what --plan plans for; a run takes the processes it is started on"
            )
