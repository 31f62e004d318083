"""Process groups: from torchrun's environment to megatron-core's groups, and back."""

import gc
import os
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError, UsageError

SEED_STRIDE = 1_000_003  # farther apart than the offsets megatron-core adds for its own generators


def connect(device: Device, timeout_minutes: int = 30) -> None:
    """Join the job's default process group; a single process needs no launcher.

    Raises:
        InputError: the rendezvous port is taken.
    """
    if torch.distributed.is_initialized():
        return
    alone = "RANK" not in os.environ
    timeout = timedelta(minutes=timeout_minutes)
    device.set_current(int(os.environ.get("LOCAL_RANK", 0)))
    if alone:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
        torch.distributed.init_process_group(
            device.backend, store=of_this_attempt(store), rank=rank, world_size=size, timeout=timeout
        )
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(f"cannot meet at {address} ({error}); set MASTER_PORT to a free port") from error


def of_this_attempt(store: torch.distributed.Store) -> torch.distributed.Store:
    """The launcher's store without what an earlier attempt of a restarted job left in it.

    torchrun on one node with a fixed port (torch 2.13) keeps its store over restarts: the addresses of the dead
    processes are still there, under the same keys, and the new ones would try to reach them. Several nodes count
    their attempts apart, so that the count cannot name a store they share.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return torch.distributed.PrefixStore(f"attempt_{attempt}", store)


def start(
    device: Device,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int | None = None,
    seed: int = 1234,
    timeout: int = 30,
    expert: int = 1,
    expert_tensor: int | None = None,
    context: int = 1,
) -> None:
    """Create megatron-core's groups for TP x CP x PP (x VPP); data parallelism takes the remaining processes.

    In layers with experts the same processes are divided into ETP x EP x PP instead.

    Args:
        virtual: model chunks per pipeline stage, None without interleaving.
        seed: of the model-parallel generators.
        timeout: minutes until a collective that misses a rank fails.
        expert: processes over which the experts are spread (EP).
        expert_tensor: processes over which each expert is cut (ETP); None for as many as `tensor`.
        context: processes over which a sequence is cut (CP).

    Raises:
        UsageError: the processes do not divide into TP x CP x PP, or not into ETP x EP x PP.
    """
    connect(device, timeout)
    world = torch.distributed.get_world_size()
    if world % (tensor * context * pipeline):
        cut = f" x context-parallel-size {context}" if context > 1 else ""
        raise UsageError(
            f"{world} processes cannot hold tensor-model-parallel-size {tensor}{cut} x pipeline-model-parallel-size "
            f"{pipeline}: start a multiple of {tensor * context * pipeline} (NPROC_PER_NODE x NNODES)"
        )
    expert_tensor = expert_tensor or tensor
    if world % (expert_tensor * expert * pipeline):
        raise UsageError(
            f"{world} processes cannot hold expert-tensor-parallel-size {expert_tensor} x expert-model-parallel-size "
            f"{expert} x pipeline-model-parallel-size {pipeline}: start a multiple of "
            f"{expert_tensor * expert * pipeline} (NPROC_PER_NODE x NNODES)"
        )
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        virtual,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        distributed_timeout_minutes=timeout,
        create_gloo_process_groups=device.backend != "gloo",
    )
    seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Seed megatron-core's generators and torch's own: alike over TP, apart over PP and DP (CP included)."""
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    seed += SEED_STRIDE * (replica * stages + parallel_state.get_pipeline_model_parallel_rank())
    torch.manual_seed(seed)  # of the host, which seeds adapters' dropout
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def expert_place(num_experts: int) -> tuple[int, int, int, int]:
    """(first expert, experts, ETP rank, ETP size) of this process, for a model of `num_experts`; all 0 or 1 without.

    Raises:
        UsageError: the experts do not divide over expert-model-parallel-size.
    """
    spread = parallel_state.get_expert_model_parallel_world_size()
    if num_experts % spread:
        raise UsageError(
            f"--expert-model-parallel-size {spread} does not divide the model's {num_experts} experts;"
            f" choose a divisor of {num_experts}"
        )
    own = num_experts // spread
    rank, size = (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    return parallel_state.get_expert_model_parallel_rank() * own, own, rank, size


def stop() -> None:
    """Destroy megatron-core's groups; the default process group stays, so another layout can follow.

    megatron-core only forgets them: torch would keep each one's connections and threads until the process ends.
    """
    forgotten = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in forgotten:
        if isinstance(group, torch.distributed.ProcessGroup):
            torch.distributed.destroy_process_group(group)
    # megatron-core keeps the weight of the balance of experts per process; the next engine's may have another shape
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    gc.collect()  # a group's threads end with the last reference to it


def disconnect() -> None:
    """Leave the job."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
