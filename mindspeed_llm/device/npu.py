"""Ascend NPUs: hccl, torch_npu and MindSpeed's adaptor. Written from their documentation; never run on a card here."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_llm.device import kernels
from mindspeed_llm.device.base import PLAIN_TORCH, Device
from mindspeed_llm.device.grouped import KernelProducts
from mindspeed_llm.device.profiler import Profiler
from mindspeed_llm.device.segments import Segments
from mindspeed_llm.errors import InputError

MISSING = "torch_npu is not installed, or it sees no Ascend NPU (is CANN's set_env.sh sourced?)"


def available() -> bool:
    """Whether torch_npu is installed and sees a card."""
    if find_spec("torch_npu") is None:
        return False
    import_module("torch_npu")
    return torch.npu.is_available()


CAUSAL, BAND = 2, 4
"""Sparse modes of the fusion operator: each token sees those before it, or a band of them; both take a triangular mask
of MASK x MASK, whatever the length."""
MASK = 2048
EVERYTHING = 2**31 - 1


def fusion_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor | None:
    """All segments in one call of CANN's fusion attention, causal; see `kernels.SegmentKernel`.

    Layout TND: tokens of all segments, heads, head dimension; `actual_seq_qlen` holds where each segment ends.

    Args:
        query: [1, n, t, d]; key, value: [1, g, t, d].

    Returns:
        [1, n, t, d], in memory order [t, n, d]; None for float32, which the operator does not take.
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        return None
    operator = import_module("torch_npu").npu_fusion_attention
    ends = torch.tensor(segments.lengths).cumsum(0).tolist()
    mask = torch.ones(MASK, MASK, dtype=torch.bool, device=query.device).triu(1)  # True is hidden
    flat = (one[0].transpose(0, 1).contiguous() for one in (query, key, value))
    out = operator(
        *flat,
        query.size(1),
        "TND",
        atten_mask=mask,
        scale=scale,
        pre_tockens=EVERYTHING if window is None else window - 1,
        next_tockens=0,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=CAUSAL if window is None else BAND,
    )[0]
    return out.transpose(0, 1)[None]


def grouped_matmul(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """CANN's grouped product; see `grouped.Kernel`.

    One tensor of rows, cut along its rows (`group_type` 0) where `group_list` says (`group_list_type` 0: where groups
    end, int64), and one tensor of results (`split_item` 3).
    """
    operator = import_module("torch_npu").npu_grouped_matmul
    return operator([rows], [factors], group_list=ends.long(), group_list_type=0, group_type=0, split_item=3)[0]


def _profiler(path: Path) -> Profiler:
    """torch_npu's profiler, which writes a folder per process (trace, operators, kernels) beside where `path` would be.

    Its activities have names of their own; torch's know no NPU.
    """
    own = import_module("torch_npu").profiler
    folder = path.with_suffix("")
    return own.profile(
        activities=[own.ProfilerActivity.CPU, own.ProfilerActivity.NPU],
        record_shapes=True,
        on_trace_ready=own.tensorboard_trace_handler(str(folder)),
    )


def create() -> Device:
    """Load MindSpeed's adaptor for megatron-core and describe the NPU.

    Raises:
        InputError: MindSpeed is not installed; megatron-core does not run on an NPU without it.
    """
    if find_spec("mindspeed") is None:
        raise InputError(
            "--device npu needs MindSpeed (branch core_r0.16.0), which adapts megatron-core to Ascend; "
            "install it, or use --device cpu"
        )
    import_module("mindspeed.megatron_adaptor")
    return Device(
        name="npu",
        backend="hccl",
        torch_device=lambda index: torch.device("npu", index),
        set_current=torch.npu.set_device,
        memory=lambda: (torch.npu.memory_allocated(), torch.npu.max_memory_allocated()),
        capacity=lambda: torch.npu.mem_get_info()[1],
        rng_state=torch.npu.get_rng_state,
        set_rng_state=torch.npu.set_rng_state,
        manual_seed=torch.npu.manual_seed,
        synchronize=torch.npu.synchronize,
        attention=kernels.attention_with(fusion_segments),
        rms_norm=kernels.RMSNorm,
        profiler=_profiler,
        grouped=KernelProducts(grouped_matmul),
        engine_config=dict(PLAIN_TORCH),
    )
