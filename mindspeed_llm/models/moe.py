"""Layers with experts: megatron-core's MoE layer, dispatcher and experts, with a router of our own.

megatron-core's routing differs from the models' in the order of scaling, in the scoring of groups and in what it
refuses (a correction without sigmoid); `choose_experts` says what `ModelConfig` asks for, in a few lines.

Shapes: t tokens, h hidden, e experts, k experts per token, g groups; `/t` = divided by expert tensor parallelism.
"""

from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from mindspeed_llm.device.grouped import GroupedProducts
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.experts import GroupedExperts
from mindspeed_llm.models.linear import PartialSumLinear, with_bias


def moe_options(model: ModelConfig) -> dict[str, Any]:
    """Fields of megatron-core's configuration that describe the experts; none for a dense model."""
    if not model.num_experts:
        return {}
    options: dict[str, Any] = {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_router_topk": model.moe_router_topk,
        # The router here chooses by itself; these two only say which scores its auxiliary loss balances.
        "moe_router_score_function": "sigmoid" if model.moe_router_score == "sigmoid" else "softmax",
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
    }
    return options


def expert_mlp_spec(model: ModelConfig, grouped: GroupedProducts | None) -> ModuleSpec:
    """The MLP of a layer with experts, computed together by `grouped`, or one after another without."""
    row = PartialSumLinear if model.add_mlp_bias else RowParallelLinear
    experts = MLPSubmodules(
        linear_fc1=with_bias(ColumnParallelLinear, model.add_mlp_bias), linear_fc2=with_bias(row, model.add_mlp_bias)
    )
    computed = ModuleSpec(module=SequentialMLP, submodules=experts)
    if grouped is not None:
        computed = ModuleSpec(module=GroupedExperts, submodules=experts, params={"grouped": grouped})
    shared = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            router=partial(Router, model=model),
            experts=computed,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
        ),
    )


def choose_experts(logits: Tensor, correction: Tensor | None, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to, and how much each counts.

    Args:
        logits: [t, e] fp32.
        correction: [e] added to the scores for choosing only; None without.

    Returns:
        (weights [t, k] fp32, experts [t, k]).
    """
    if model.moe_router_score == "softmax_topk":
        best, chosen = logits.topk(model.moe_router_topk, dim=-1)
        return best.softmax(dim=-1), chosen
    scores = logits.sigmoid() if model.moe_router_score == "sigmoid" else logits.softmax(dim=-1)
    ranking = scores if correction is None else scores + correction
    if model.moe_router_groups > 1:
        ranking = within_best_groups(ranking, model)
    chosen = ranking.topk(model.moe_router_topk, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if model.moe_router_norm_topk:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all round to 0
    return weights * model.moe_router_scale, chosen


def within_best_groups(ranking: Tensor, model: ModelConfig) -> Tensor:
    """[t, e] with -inf outside each token's best groups; a group counts as its best expert or its two best."""
    groups = ranking.view(ranking.size(0), model.moe_router_groups, -1)  # [t, g, e / g]
    if model.moe_router_group_score == "max":
        score = groups.amax(dim=-1)
    else:
        score = groups.topk(2, dim=-1).values.sum(dim=-1)
    best = score.topk(model.moe_router_group_topk, dim=-1).indices
    outside = torch.ones_like(score, dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).view_as(ranking)


class Router(TopKRouter):
    """megatron-core's router (parameters, auxiliary losses) that chooses experts as `ModelConfig` says.

    Logits are computed in float32 whatever the type of the weights. The correction is a buffer in float32 that training
    leaves as it is. The losses that keep the choice balanced and logits small are computed here too: megatron-core's
    count padding, and under per-token loss weigh micro-batches by tokens that are not trained (defect 14).

    Attributes:
        balance_scale: factor of those losses' gradients; constant during a step, so that recomputation and pipelining
            change nothing.
        balance_seen: sum of this process's shares of the balancing losses since somebody set it to 0.
    """

    balance_scale: float = 1.0
    balance_seen: Tensor | float = 0.0

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, *, model: ModelConfig) -> None:
        config = copy(config)
        config.add_bias_linear = model.moe_router_bias  # megatron-core's one switch; the other modules do not see it
        super().__init__(config, pg_collection)
        self.model = model
        self.sequence_parallel = config.sequence_parallel
        if model.moe_expert_bias:
            del self.expert_bias  # megatron-core's is one that every step moves, and for sigmoid scores only
            self.register_buffer("expert_bias", torch.zeros(model.num_experts, dtype=torch.float32))

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [s, b, h] -> (weights [t, e], chosen [t, e]), as `routing`.

        Args:
            added: [s, b, e] fp32, an adapter's share of the logits; None without one.
        """
        logits = self.gating(input)
        return self.routing(logits if added is None else logits + added, padding_mask)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, e] fp32 of hidden states [s, b, h]."""
        bias = None if self.bias is None else self.bias.float()
        return linear(input.float(), self.weight.float(), bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [s, b, e] -> (weights [t, e], 0 where not chosen; chosen [t, e]).

        Args:
            padding_mask: [s, b], True where a position is padding and does not count for balance; None for nowhere.
        """
        flat = logits.reshape(-1, logits.size(-1))
        weights, experts = choose_experts(flat, self.expert_bias, self.model)
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, experts, True)
        probs = torch.zeros_like(flat).scatter(1, experts, weights)
        if self.training and torch.is_grad_enabled():
            probs = self.balance(probs, logits, padding_mask)
        return probs, chosen

    def balance(self, probs: Tensor, logits: Tensor, padding_mask: Tensor | None) -> Tensor:
        """`probs`, to whose backward pass the gradients of the losses on the router's logits are attached."""
        config = self.config
        if not config.moe_aux_loss_coeff and not config.moe_z_loss_coeff:
            return probs
        counted = torch.ones_like(logits[..., 0]) if padding_mask is None else (~padding_mask).to(logits.dtype)
        loss = torch.zeros((), device=logits.device)
        if config.moe_aux_loss_coeff:
            rows_apart = config.moe_router_load_balancing_type == "seq_aux_loss"
            balance = load_balancing_loss(logits, counted, self.topk, self.score_function, rows_apart, self.tp_cp_group)
            self.balance_seen = self.balance_seen + balance.detach()
            loss = loss + config.moe_aux_loss_coeff * balance
        if config.moe_z_loss_coeff:
            total = summed(counted.sum(), self.tp_cp_group)
            loss = loss + config.moe_z_loss_coeff * (logits.logsumexp(-1).square() * counted).sum() / total
        return _Attached.apply(probs, loss, self.balance_scale)


class _Attached(torch.autograd.Function):
    """A tensor as it is, whose backward pass also asks for `scale` x the gradient of a loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.like = loss.new_empty(())
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def summed(value: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the processes' values, a constant for autograd."""
    value = value.detach().clone()
    if group.size() > 1:
        torch.distributed.all_reduce(value, group=group)
    return value


def load_balancing_loss(
    logits: Tensor, counted: Tensor, k: int, score: str, rows_apart: bool, group: ProcessGroup
) -> Tensor:
    """This process's share of e x sum over experts of (share of the choices) x (mean score); 1 when balanced.

    The shares of a group's processes, which have different positions of the same rows, add up to the loss. It is
    Switch Transformer's (arXiv 2101.03961), over the tokens of a micro-batch, or of each row and then averaged.

    Args:
        logits: [s, b, e]; counted: [s, b], 1 where a position counts, else 0.
        k: experts per token; choices are the k best scores, whatever corrections and groups then choose.
        score: "softmax" or "sigmoid" (divided by their sum).
        rows_apart: balance every row by itself.
    """
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    if score == "sigmoid":
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    choices = torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)
    weight = counted.unsqueeze(-1)
    over = (0,) if rows_apart else (0, 1)
    known = torch.cat([(choices * weight).sum(over), weight.sum(over)], -1)  # [(b,) e + 1]
    chosen, tokens = summed(known, group).split([logits.size(-1), 1], -1)
    tokens = tokens.clamp(min=1)
    loss = ((chosen / (k * tokens)) * ((scores * weight).sum(over) / tokens)).sum(-1) * logits.size(-1)
    return loss.mean()


def routers(module: nn.Module) -> list[Router]:
    """All routers below `module`."""
    return [one for one in module.modules() if isinstance(one, Router)]
