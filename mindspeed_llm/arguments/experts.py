"""How experts are trained."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class ExpertOptions:
    """Mixture of experts; coefficients are refused where the model has none."""

    moe_aux_loss_coeff: float | None = option(
        None,
        help="Coefficient of the loss that balances the experts' load. Left out, router_aux_loss_coef of the model's "
        "config.json where that sets output_router_logits, else 0.",
    )
    moe_router_load_balancing_type: str = option(
        "aux_loss",
        help="Over what the load is balanced: the tokens of a micro-batch (aux_loss), those of each row "
        "(seq_aux_loss), or nothing (none).",
        choices=("aux_loss", "seq_aux_loss", "none"),
    )
    moe_z_loss_coeff: float | None = option(
        None, help="Coefficient of the loss that keeps router logits small; left out, none."
    )
    moe_grouped_gemm: bool = option(
        True,
        help="Compute all experts of a process together: one grouped product per layer instead of one per expert. "
        "false runs one expert after another, with the same result.",
    )

    def check(self) -> None:
        """Raise UsageError for negative coefficients and for one that the type takes away."""
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must not be negative")
        if self.moe_router_load_balancing_type == "none" and self.moe_aux_loss_coeff:
            raise UsageError(
                f"--moe-aux-loss-coeff {self.moe_aux_loss_coeff} and --moe-router-load-balancing-type none contradict "
                "each other; leave one out"
            )
