"""Events planted into a run by the tests: signals, kills, broken numbers. Each is a context manager."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` replaced by `make(original)` for a while."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _signal_in_step(number: signal.Signals, step: int, rank: int = 0) -> Iterator[None]:
    """This process gets a real signal in the middle of its `step`-th step."""
    from mindspeed_llm.training import loop

    seen = [0]

    def make(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            seen[0] += 1
            if seen[0] == step and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), number)
            return train_step(*args)

        return stepped

    with replaced(loop, "train_step", make):
        yield


def terminated_in_step_3() -> Any:
    """SIGTERM on rank 0."""
    return _signal_in_step(signal.SIGTERM, 3)


def usr1_in_step_3_of_rank_1() -> Any:
    """SIGUSR1 on rank 1 alone, as when a scheduler warns one node."""
    return _signal_in_step(signal.SIGUSR1, 3, rank=1)


@contextlib.contextmanager
def killed_writing(call: int) -> Iterator[None]:
    """SIGKILL when a rank's file is written for the `call`-th time, after half of it."""
    from mindspeed_llm.training import saving

    seen = [0]

    def make(write: Callable[..., Any]) -> Callable[..., Any]:
        def half(path: Any, content: Any) -> None:
            seen[0] += 1
            write(path, content)
            if seen[0] == call:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return half

    with replaced(saving, "write_torch_file", make):
        yield


@contextlib.contextmanager
def killed_before_tracker(call: int) -> Iterator[None]:
    """SIGKILL between the publication of the `call`-th checkpoint and its tracker."""
    from mindspeed_llm.training import saving

    seen = [0]

    def make(write: Callable[..., Any]) -> Callable[..., Any]:
        def kill(*args: Any) -> None:
            seen[0] += 1
            if seen[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args)

        return kill

    with replaced(saving, "write_tracker", make):
        yield


def slow_rank_files() -> Any:
    """A rank's file takes half a second more."""
    from mindspeed_llm.training import saving

    def make(write: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any) -> None:
            time.sleep(0.5)
            write(*args)

        return slow

    return replaced(saving, "write_torch_file", make)


def _free(*sizes: int) -> Any:
    """The file system has these many bytes free when it is asked; the last holds from then on."""
    from mindspeed_llm.training import saving

    left = list(sizes)
    return replaced(saving, "free_space", lambda _: lambda folder: left.pop(0) if len(left) > 1 else left[0])


def no_room() -> Any:
    """From the start."""
    return _free(1000)


def no_room_at_the_first_save() -> Any:
    """There is some at the start."""
    return _free(10**9, 1000)


def no_room_at_the_second_save() -> Any:
    """It comes back afterwards."""
    return _free(10**9, 10**9, 1000, 10**9)


@contextlib.contextmanager
def recorded(folder: str) -> Iterator[None]:
    """What the engine receives at every step and validation, one line of JSON each, by rank, in `folder`."""
    from mindspeed_llm.training import loop

    rank = int(os.environ.get("RANK", 0))

    def write(kind: str, batches: Any) -> None:
        lines = [{name: array.tolist() for name, array in batch.items() if name != "lengths"} for batch in batches]
        with open(os.path.join(folder, f"{kind}_{rank}.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(lines) + "\n")

    def make_step(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(model: Any, batches: Any) -> Any:
            write("train", batches)
            return train_step(model, batches)

        return stepped

    def make_evaluate(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluated(model: Any, global_batches: Any) -> float:
            kept = list(global_batches)
            for batches in kept:
                write("valid", batches)
            return evaluate(model, iter(kept))

        return evaluated

    with replaced(loop, "train_step", make_step), replaced(loop, "evaluate", make_evaluate):
        yield


@contextlib.contextmanager
def raised_while_preparing(kind: str, seconds: float) -> Iterator[None]:
    """Preparing raw rows fails on rank 0 after a while with an error of mindspeed_llm.errors."""
    from mindspeed_llm import errors
    from mindspeed_llm.training import rows

    def make(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*args: Any) -> Any:
            time.sleep(seconds)
            raise getattr(errors, kind, RuntimeError)("the cause of it")

        return fail

    with replaced(rows, "prepare_rows", make):
        yield


@contextlib.contextmanager
def node_folders(parent: str) -> Iterator[None]:
    """Every process is a node of its own that runs in `<parent>/node<rank>`: the nodes share no relative path."""
    kept = {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    os.environ.update({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    os.chdir(os.path.join(parent, f"node{os.environ['RANK']}"))
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def orders_kept_on_disk(folder: str) -> Iterator[None]:
    """As with millions of rows: orders of rows go through the index cache, and only rank 0 may draw them.

    What the engine receives is recorded in `folder`.
    """
    from mindspeed_llm.data.sampler import EpochSampler
    from mindspeed_llm.training import rows

    def make(draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(self: Any, epoch: int) -> Any:
            assert os.environ["RANK"] == "0" or not self.shuffle, "another rank draws an order"
            return draw(self, epoch)

        return drawn

    with (
        replaced(rows, "CACHED_ROWS", lambda _: 1),
        replaced(EpochSampler, "_draw_order", make),
        recorded(folder),
    ):
        yield


@contextlib.contextmanager
def counted_flops(file: str) -> Iterator[None]:
    """FLOPs of the first step as torch's own counter sees them, by operation, as JSON in `file`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from mindspeed_llm.device import native
    from mindspeed_llm.training import loop

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {kernel: forward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}

    def make(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            if os.path.exists(file):
                return train_step(*args)
            plain = mock.patch.object(native, "serves", lambda *tensors: False)  # the counter sees torch's operations
            with plain, FlopCounterMode(display=False, custom_mapping=known) as counter:
                result = train_step(*args)
            found = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
            with open(file, "w", encoding="utf-8") as stream:
                json.dump(found, stream)
            return result

        return stepped

    with replaced(loop, "train_step", make):
        yield


@contextlib.contextmanager
def _parameter_changed(which: str, step: int, rank: int) -> Iterator[None]:
    """One element of the first parameter whose name ends with `which` is changed on one rank behind a step's end."""
    from mindspeed_llm.training import loop

    seen = [0]

    def make(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(engine: Any, batches: Any) -> Any:
            result = train_step(engine, batches)
            seen[0] += 1
            if seen[0] == step and int(os.environ["RANK"]) == rank:
                named = [(n, p) for chunk in engine.chunks for n, p in chunk.named_parameters()]
                next(p for n, p in named if n.endswith(which)).data.view(-1)[0] += 0.001
            return result

        return stepped

    with replaced(loop, "train_step", make):
        yield


def adapter_changed_on_rank_1() -> Any:
    """A replica's adapter drifts away in step 2."""
    return _parameter_changed("linear_fc1.lora_B.default.weight", 2, 1)


def base_changed_on_rank_0() -> Any:
    """The frozen base is written to in step 2."""
    return _parameter_changed("linear_fc2.base_layer.weight", 2, 0)


@contextlib.contextmanager
def other_rows_on_rank_1() -> Iterator[None]:
    """Rank 1 reads another token than the ranks of the same replica, from its first step on."""
    from mindspeed_llm.training.feed import Feed

    def make(batches: Callable[..., Any]) -> Callable[..., Any]:
        def altered(self: Any, consumed: int) -> Any:
            found = batches(self, consumed)
            if int(os.environ["RANK"]) == 1:
                found[0]["tokens"][0, 0] += 1
            return found

        return altered

    with replaced(Feed, "batches", make):
        yield


@contextlib.contextmanager
def gradients_blow_up(steps: tuple[int, ...]) -> Iterator[None]:
    """The gradients of these steps are infinite although their losses are finite."""
    from mindspeed_llm.training import engine

    seen = [0]

    def make(norm: Callable[..., float]) -> Callable[..., float]:
        def infinite(optimizer: Any) -> float:
            seen[0] += 1
            return float("inf") if seen[0] in steps else norm(optimizer)

        return infinite

    with replaced(engine, "gradient_norm", make):
        yield
