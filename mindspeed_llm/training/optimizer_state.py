"""Optimizer state as tensors named by parameter, whatever the parallel layout keeps where.

megatron-core's optimizers hold fp32 master weights and moments either whole per parameter or, under the distributed
optimizer, as flat slices spread over DP. Here both are read and written as {parameter: {"master", "exp_avg",
"exp_avg_sq"}} in the parameter's own (TP-local) shape; cutting those for another TP is the weights' own algebra
(`checkpoint.live`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mindspeed_llm.checkpoint.formats.torch_dist_shards import OPTIMIZER_FORM, SHARDING

MOMENTS = ("exp_avg", "exp_avg_sq")
FIELDS = ("master", *MOMENTS)


@dataclass(frozen=True)
class _Shard:
    """The part of one parameter this rank's optimizer updates.

    Attributes:
        main: the tensor the inner optimizer owns, fp32.
        start, stop: its range in the flattened parameter; the whole of it without the distributed optimizer.
    """

    main: Tensor
    start: int
    stop: int


def inner_optimizers(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers behind `optimizer`: dense parameters have one, experts another."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _optimizer_of(optimizer: Any) -> dict[nn.Parameter, Any]:
    """Parameter -> the optimizer that updates it, or a shard of it."""
    found: dict[nn.Parameter, Any] = {}
    for one in inner_optimizers(optimizer):
        if hasattr(one, "model_param_gbuf_map"):
            found |= {p: one for buffer in one.buffers for p in buffer.params}
        else:
            for groups in (getattr(one, "float16_groups", []), getattr(one, "fp32_from_fp32_groups", [])):
                found |= {p: one for group in groups for p in group}
            if not hasattr(one, "float16_groups"):
                found |= dict.fromkeys(one.get_parameters(), one)
    return found


def _shard(optimizer: Any, parameter: nn.Parameter) -> _Shard | None:
    """This rank's shard of a trainable parameter, or None when other DP ranks own all of it."""
    if not hasattr(optimizer, "model_param_gbuf_map"):
        return _Shard(getattr(parameter, "main_param", parameter), 0, parameter.numel())
    if parameter not in optimizer.model_param_group_index_map:
        return None
    owned = optimizer._get_model_param_range_map(parameter)["param"]
    group, order = optimizer.model_param_group_index_map[parameter]
    return _Shard(optimizer.optimizer.param_groups[group]["params"][order], owned.start, owned.end)


def _gathered(values: Tensor | None, shard: _Shard | None, parameter: nn.Parameter, group: Any) -> Tensor:
    """The whole parameter-shaped tensor, put together over DP; on the CPU."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if shard is not None and values is not None:
        whole[shard.start : shard.stop] = values.detach().reshape(-1)
    if group is not None:
        torch.distributed.all_reduce(whole, group=group)
    return whole.view(parameter.shape).cpu()


def _dp_group(optimizer: Any) -> Any:
    """The group over which state is spread, or None when every DP rank holds all of it."""
    return optimizer.data_parallel_group if hasattr(optimizer, "model_param_gbuf_map") else None


def export_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """-> ({name: {field: fp32 tensor of the parameter's shape}}, Adam's step count). Collective over DP.

    Before the first update the moments are zero and the step is 0. All ranks take part.
    """
    owners = _optimizer_of(optimizer)
    state: dict[str, dict[str, Tensor]] = {}
    steps = 0
    for name, parameter in parameters.items():
        owner = owners[parameter]
        shard = _shard(owner, parameter)
        inner = owner.optimizer.state.get(shard.main, {}) if shard else {}
        values = {"master": shard.main if shard else None, **{m: inner.get(m) for m in MOMENTS}}
        state[name] = {field: _gathered(values[field], shard, parameter, _dp_group(owner)) for field in FIELDS}
        steps = max(steps, int(inner.get("step", 0)))
    for one in inner_optimizers(optimizer):
        if one.optimizer is not None:
            steps = max([steps, *(int(g.get("step", 0)) for g in one.optimizer.param_groups)])
    counts = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, steps)  # a rank may hold no state
    return state, max(counts)


@torch.no_grad()
def import_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Tensor]], steps: int
) -> None:
    """Put `export_state`'s values back, each rank taking its own shard; model weights follow their masters.

    Args:
        state: {name: {field: tensor of this rank's parameter shape}}.
        steps: Adam's step count.
    """
    owners = _optimizer_of(optimizer)
    for name, parameter in parameters.items():
        owner = owners[parameter]
        shard = _shard(owner, parameter)
        parameter.copy_(state[name]["master"])
        if shard is None:
            continue
        cut = {f: state[name][f].reshape(-1)[shard.start : shard.stop].to(shard.main.device) for f in FIELDS}
        shard.main.copy_(cut["master"].view(shard.main.shape))
        entry = owner.optimizer.state[shard.main]
        for moment in MOMENTS:
            entry[moment] = cut[moment].reshape(shard.main.shape).to(torch.float32).clone()
        if isinstance(owner.optimizer, torch.optim.Optimizer) and _counts_per_parameter(owner):
            entry["step"] = torch.tensor(float(steps))
    for one in inner_optimizers(optimizer):
        if one.optimizer is None or _counts_per_parameter(one):
            continue
        for group in one.optimizer.param_groups:
            group["step"] = steps


def engine_settings(optimizer: Any, steps: int) -> dict[Any, Any]:
    """What megatron-core's optimizers read back beside tensors: groups without their parameters, and the step.

    The float32 optimizer looks for them at the top, the others under "optimizer"; the distributed one takes the step
    from the groups, the others from "common_step", where torch's AdamW counts. Of several (experts have their own) each
    is under its number; where experts are not spread megatron-core's own models have one for all parameters, and those
    of a checkpoint cannot be divided: it goes on at an expert parallel size of 1, or at one above.

    Args:
        steps: Adam's step count.
    """
    found = []
    for one in inner_optimizers(optimizer):
        groups = [] if one.optimizer is None else one.optimizer.param_groups
        plain: dict[str, Any] = {
            "param_groups": [{**{k: v for k, v in each.items() if k != "params"}, "step": steps} for each in groups],
            "state": {"common_step": steps} if groups and _counts_per_parameter(one) else {},
        }
        found.append({**plain, "optimizer": plain, "param_state_sharding_type": OPTIMIZER_FORM[SHARDING]})
    alone = len(found) == 1 or parallel_state.get_expert_model_parallel_world_size() == 1
    return found[0] if alone else dict(enumerate(found))


def _counts_per_parameter(optimizer: Any) -> bool:
    """torch's AdamW counts steps per parameter; the fused Adam of other packages counts per group."""
    return type(optimizer.optimizer).__module__.startswith("torch.optim")


def export_gradients(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The finished fp32 gradients {name: tensor of the parameter's shape}, gathered over DP. Collective over DP."""
    owners = _optimizer_of(optimizer)
    gradients = {}
    for name, parameter in parameters.items():
        owner = owners[parameter]
        shard = _shard(owner, parameter)
        values = parameter.main_grad.reshape(-1)[shard.start : shard.stop] if shard else None
        gradients[name] = _gathered(values, shard, parameter, _dp_group(owner))
    return gradients
