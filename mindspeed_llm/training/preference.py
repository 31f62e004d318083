"""Direct preference optimization (Rafailov et al., arXiv 2305.18290): a pair's loss, its reference and what is told.

    r = log p(answer | prompt) - log p_ref(answer | prompt)                 summed over the answer's tokens
    D = r_chosen - r_rejected                                               reward of an answer: beta r

    sigmoid   -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)         e: --dpo-label-smoothing
    robust    (-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)) / (1 - 2 e)
    hinge     max(0, 1 - beta D)
    ipo       (r_chosen / n_chosen - r_rejected / n_rejected - 1 / (2 beta))^2         n: tokens of the answer

and to each is added --pref-ftx x -log p(chosen) / n_chosen. The reference is the base model: the same weights with the
adapters off, in a pass without gradients before the step's own. A micro-batch counts as the mean over its pairs.

Shapes: P pairs of a micro-batch, b = 2 P sequences (chosen, then rejected), s length, m labelled positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn.functional import logsigmoid

from mindspeed_llm.arguments.preference import PreferenceOptions
from mindspeed_llm.lora.layers import adapters_off
from mindspeed_llm.models.causal_lm import IGNORE
from mindspeed_llm.training import pipeline
from mindspeed_llm.training.pipeline import Batch

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
FIGURES = (*REWARDS, "logps/chosen", "logps/rejected")
"""What is told of the pairs, as TRL names and defines them: means over the pairs of a step."""


def _sigmoid(scaled: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)


def _robust(scaled: Tensor, smoothing: float) -> Tensor:
    return (smoothing * logsigmoid(-scaled) - (1 - smoothing) * logsigmoid(scaled)) / (1 - 2 * smoothing)


def _hinge(scaled: Tensor, smoothing: float) -> Tensor:
    return torch.relu(1 - scaled)


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {"sigmoid": _sigmoid, "robust": _robust, "hinge": _hinge}
"""Loss of beta D, given the smoothing; `ipo` compares means instead."""


@dataclass(frozen=True)
class Preference:
    """The objective of --stage dpo.

    Attributes:
        beta: factor of the rewards.
        loss_type: "sigmoid", "robust", "hinge" or "ipo".
        smoothing: share of pairs that may be labelled the wrong way round.
        sft: weight of the chosen answer's own loss.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    smoothing: float = 0.0
    sft: float = 0.0

    @classmethod
    def of(cls, options: PreferenceOptions) -> "Preference":
        """The objective that the options describe."""
        return cls(options.dpo_beta, options.dpo_loss_type, options.dpo_label_smoothing, options.pref_ftx)

    def pair_losses(self, policy: Tensor, reference: Tensor, counts: Tensor) -> Tensor:
        """[P], by the module's equations.

        Args:
            policy, reference: [2 P] log-probabilities of the answers.
            counts: [2 P] tokens of the answers.
        """
        ratios, counts = policy - reference, counts.clamp(min=1)
        if self.loss_type == "ipo":
            chosen, rejected = (ratios / counts).chunk(2)
            losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        else:
            chosen, rejected = ratios.chunk(2)
            losses = LOSSES[self.loss_type](self.beta * (chosen - rejected), self.smoothing)
        return losses - self.sft * (policy / counts).chunk(2)[0] if self.sft else losses

    def figures(self, policy: Tensor, reference: Tensor) -> Tensor:
        """[figures, P], the values of `FIGURES` for each pair."""
        chosen, rejected = (self.beta * (policy - reference)).chunk(2)
        accurate = (chosen > rejected).to(chosen.dtype)
        return torch.stack([chosen, rejected, accurate, chosen - rejected, *policy.chunk(2)])

    def sum_loss(self, losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [m] of this process's labelled positions -> (sum over pairs, pairs, report), as `engine.sum_loss`.

        Under CP every process has the whole loss and the gradient of its own positions, and gradients are averaged
        over the c processes afterwards: the sum counts c times. The report [S, P, S / P, tokens, sums of `FIGURES`]
        is added up over CP too, and so each process tells a c-th.
        """
        parts = parallel_state.get_context_parallel_world_size()
        policy, counts = sequence_sums(-losses, batch), labelled(batch)
        real = counts.view(2, -1).sum(0) > 0  # a pair that fills the last batch has no label
        pairs = real.sum()
        found = self.pair_losses(policy, batch["reference"], counts)
        total = (found * real).sum()
        with torch.no_grad():
            sums = (self.figures(policy, batch["reference"]) * real).sum(1).double()
            value = total.double()
            report = torch.stack([value, pairs, value / pairs.clamp(min=1), counts.sum()])
            report = torch.cat([report, sums]) / parts
        return total * parts if parts > 1 else total, pairs.int(), report


def labelled(batch: Batch) -> Tensor:
    """[2 P] labelled positions of each sequence of a whole micro-batch; the same on all CP ranks."""
    trained = batch["labels"] != IGNORE
    numbers = torch.arange(2 * batch["pairs"], device=trained.device).unsqueeze(1)
    return ((batch["sequences"].reshape(1, -1) == numbers) & trained.reshape(1, -1)).sum(1)


def sequence_sums(values: Tensor, batch: Batch) -> Tensor:
    """Values [m] of this process's labelled positions -> their sums [2 P] over each whole sequence.

    Sums over CP pass the gradient on unchanged: every process computes the same of them. Sums are by comparison and
    not by scattered addition, whose order differs from run to run on accelerators.
    """
    group = parallel_state.get_context_parallel_group()
    labels, sequences = pipeline.own(batch, "labels", "sequences")
    which = sequences.t().reshape(-1)[labels.t().reshape(-1) != IGNORE]
    numbers = torch.arange(2 * batch["pairs"], device=values.device).unsqueeze(1)
    sums = torch.where(which == numbers, values, 0.0).sum(1)
    return reduce_from_tensor_model_parallel_region(sums, group=group) if group.size() > 1 else sums


@torch.no_grad()
def with_reference(models: Sequence[Any], batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches with `reference`, the base's log-probabilities [2 P] of their answers, on the last stage.

    One more pass through the pipeline: adapters off, no gradients, evaluation mode. Other stages need nothing of it.

    Args:
        models: this rank's chunks.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(adapters_off(model))
        found = pipeline.run(models, _reference_step, batches, forward_only=True, collect_non_loss_data=True)
    return [{**batch, "reference": told} for batch, told in zip(batches, found or [None] * len(batches), strict=True)]


def _reference_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """One micro-batch through one chunk; of the last chunk's output the answers' log-probabilities are kept."""
    batch = next(batches)
    return pipeline.forward(batch, model), partial(_log_probabilities, batch=batch)


def _log_probabilities(losses: Tensor, batch: Batch, non_loss_data: bool) -> Tensor:
    """[2 P]; `non_loss_data` is how megatron-core's schedule asks for it."""
    return sequence_sums(-losses, batch)
