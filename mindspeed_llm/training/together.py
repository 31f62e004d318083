"""What one process does for all, and what all must do alike: a failure on one ends every process with its cause.

Ranks wait for long work by asking the job's key-value store, not in a collective, whose time limit
(--distributed-timeout-minutes) is about hangs. Nothing here needs a file system that the nodes share.
"""

import json
import os
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mindspeed_llm.errors import InputError, UsageError

T = TypeVar("T")
LONGEST_PAUSE = 0.5  # seconds between two questions to the store
ERRORS: dict[str, type[Exception]] = {"UsageError": UsageError, "InputError": InputError}


def works_for_all(each_node: bool) -> bool:
    """Whether this process is the one that does it: rank 0, or the first process of each node."""
    return int(os.environ.get("LOCAL_RANK" if each_node else "RANK", "0")) == 0


def done_by_one(work: Callable[[], Any], each_node: bool = False) -> Any:
    """The answer of `work`, done by one process and told to all; it may take any time. Collective.

    Args:
        work: its answer is made of JSON values.
        each_node: the first process of each node works, for its own node.

    Raises:
        UsageError, InputError: on every rank, when the work has raised it on one.
    """
    if torch.distributed.get_world_size() == 1:
        return work()
    store = torch.distributed.distributed_c10d._get_default_store()
    works = works_for_all(each_node)
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, (uuid.uuid4().hex, works))
    token, workers = told[0][0], sum(working for _, working in told)  # keys outlive a call: each has its own
    mine = f"{token}/{node() if each_node else 0}"
    if works:
        try:
            store.set(mine, json.dumps(work()))
            store.add(f"{token}/done", 1)
        except BaseException as error:
            store.set(f"{token}/failed", json.dumps(_described(error)))
            raise
    _wait(store, token, workers)
    return json.loads(store.get(mine))


def _wait(store: Any, token: str, workers: int) -> None:
    """Wait until all workers are done, or one has failed: then every rank ends, also those whose own work is done."""
    pause = 0.01
    while store.add(f"{token}/done", 0) < workers:
        if store.check([f"{token}/failed"]):
            kind, text = json.loads(store.get(f"{token}/failed"))
            raise ERRORS.get(kind, InputError)(text)
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)


def node() -> str:
    """This node among those of the job, as the launcher numbers them."""
    return os.environ.get("GROUP_RANK") or str(
        int(os.environ.get("RANK", "0")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )


def done_by_each(work: Callable[[], T]) -> T:
    """This rank's answer of `work`, which all do at once and in about the same time. Collective.

    Raises:
        UsageError, InputError: on every rank, when the work has raised it on any; the lowest such rank's.
    """
    answer, error = None, None
    try:
        answer = work()
    except Exception as caught:
        error = caught
    if torch.distributed.get_world_size() > 1:
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, None if error is None else _described(error))
        if error is None:
            for found in filter(None, told):
                raise ERRORS.get(found[0], InputError)(found[1])
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def same_for_all(value: Any, what: str, remedy: str) -> None:
    """Refuse to go on where ranks do not have the same `value`, which can be pickled. Collective.

    Raises:
        InputError: naming the first rank that has another one than rank 0.
    """
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, value)
    for rank, other in enumerate(told):
        if other != told[0]:
            raise InputError(f"rank {rank} has other {what} than rank 0; {remedy}")


def _described(error: BaseException) -> tuple[str, str]:
    """Kind and text of an error, for ranks that have not met it themselves."""
    kind = type(error).__name__
    return kind, str(error) if kind in ERRORS else f"rank {os.environ.get('RANK', '0')} has failed: {kind}: {error}"
