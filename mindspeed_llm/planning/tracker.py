"""Live tensor bytes of a training step by class, counted as tensors come and go.

Every storage that an operation makes is counted from then on until torch frees it, whatever made it: autograd, a
custom function, megatron-core's buffers. Memory inside a kernel, and what an allocator keeps beyond that, is not.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLASSES = ("weights", "adapters", "gradients", "optimizer", "activations", "communication")
RECEIVED = {"_allgather_base_": 0, "allgather_into_tensor_coalesced_": 0, "recv_": 0, "alltoall_base_": 0}
"""c10d operations whose result is a buffer made for it, and the argument that holds it."""


class LiveMemory(TorchDispatchMode):
    """Counts live bytes while it is entered.

    Classes: those of the tensors given; `optimizer` also what an optimizer's step makes, state and temporaries;
    `communication` what gathers and receives write into; `activations` everything else.

    Attributes:
        live: bytes now, by class.
        peak: largest bytes of each class, each at its own moment.
        total: largest bytes of all classes together, and `at_total` their shares then.
    """

    def __init__(self, known: Mapping[str, Iterable[Tensor]]) -> None:
        """Args: known: class -> tensors that exist already."""
        super().__init__()
        self.live = dict.fromkeys(CLASSES, 0)
        self.peak = dict.fromkeys(CLASSES, 0)
        self.total, self.at_total = 0, dict(self.live)
        self.storages: dict[int, tuple[Any, str, int]] = {}
        self.born_as = "activations"
        self.hooks: list[Any] = []
        for kind, tensors in known.items():
            for tensor in tensors:
                self._count(tensor, kind)
        self._record()

    def __enter__(self) -> "LiveMemory":
        def optimizer_begins(*args: Any) -> None:
            self.born_as = "optimizer"

        def optimizer_ends(*args: Any) -> None:
            self.born_as = "activations"

        self.hooks = [
            register_optimizer_step_pre_hook(optimizer_begins),
            register_optimizer_step_post_hook(optimizer_ends),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._count(one, self.born_as)
        if func.namespace == "c10d":
            self._received(func.overloadpacket.__name__, args)
        self._record()
        return result

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages or not storage.nbytes():
            return
        self.storages[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, storage.nbytes()
        self.live[kind] += storage.nbytes()

    def _forget(self, key: int) -> None:
        _, kind, size = self.storages.pop(key)
        self.live[kind] -= size

    def _received(self, operation: str, args: Any) -> None:
        """File what a gather or receive has written into under `communication`."""
        if operation not in RECEIVED:
            return
        for tensor in tree_leaves(args[RECEIVED[operation]]):
            key = tensor.untyped_storage()._cdata
            reference, kind, size = self.storages.get(key, (None, "", 0))
            if kind == "activations":
                self.storages[key] = reference, "communication", size
                self.live[kind] -= size
                self.live["communication"] += size

    def _record(self) -> None:
        for kind, size in self.live.items():
            self.peak[kind] = max(self.peak[kind], size)
        total = sum(self.live.values())
        if total > self.total:
            self.total, self.at_total = total, dict(self.live)
