"""Networks as things that run over the text: transformers' and ours, each in memory only while it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mindspeed_llm import device
from mindspeed_llm.checkpoint.formats.lazy import TensorSource, element_count
from mindspeed_llm.checkpoint.verify.exact import Adapter
from mindspeed_llm.checkpoint.verify.reference import Reference
from mindspeed_llm.checkpoint.verify.trace import Agreement, Trace, compare
from mindspeed_llm.checkpoint.verify.view import HfTensors
from mindspeed_llm.device import quiet

PROCESS_BYTES = 1_200_000_000
"""Memory of a process that has imported torch, transformers and megatron-core, and of what both networks say."""
HEADROOM = 1.2
"""Memory of a model that is being loaded, in units of its own."""


@dataclass
class Network:
    """One network over the text.

    Attributes:
        name: for people.
        compute: (type of weights and activations, the truth's run) -> its run; layers are held against the truth's
            where the network can.
        kept: the run without a truth, by type.
    """

    name: str
    compute: Callable[[torch.dtype, Trace | None], Trace]
    kept: dict[torch.dtype, Trace] = field(default_factory=dict)

    def as_truth(self, dtype: torch.dtype) -> Trace:
        """Its run, computed once."""
        if dtype not in self.kept:
            self.kept[dtype] = self.compute(dtype, None)
        return self.kept[dtype]


@dataclass(frozen=True)
class Setting:
    """What all networks of one comparison share.

    Attributes:
        ids: [1, s] token ids.
        max_memory: bytes; larger models run layer by layer.
        model_bytes: of the model in float32.
    """

    ids: torch.Tensor
    max_memory: int
    model_bytes: int

    def streamed(self, dtype: torch.dtype = torch.float32) -> bool:
        """Whether a network in this type runs layer by layer."""
        whole = self.model_bytes * dtype.itemsize / 4
        return PROCESS_BYTES + HEADROOM * whole > self.max_memory

    def transformers(self, name: str, folder: Path, tensors: HfTensors, untied: bool = False) -> Network:
        """transformers' network of the class `folder` names, over these HF tensors."""

        def compute(dtype: torch.dtype, truth: Trace | None) -> Trace:
            return Reference(folder, tensors, self.streamed(dtype), dtype, untied).run(self.ids)

        return Network(name, compute)

    def live(self, name: str, source: TensorSource, adapter: Adapter | None = None) -> Network:
        """Our network over a source, with an unmerged adapter where one is given; `engine` has to be active."""

        def compute(dtype: torch.dtype, truth: Trace | None) -> Trace:
            from mindspeed_llm.checkpoint.verify.subject import Subject

            chosen = device.select("cpu")
            return Subject(source, chosen, self.streamed(dtype), dtype, adapter).run(self.ids, truth)

        return Network(name, compute)


def engine() -> AbstractContextManager[None]:
    """megatron-core, imported and set up for this one process on the CPU."""
    quiet.silence()
    chosen = device.select("cpu")
    from mindspeed_llm.checkpoint.verify import subject

    return subject.engine(chosen)


def model_bytes(source: TensorSource) -> int:
    """Bytes of a model's weights in float32."""
    return 4 * sum(element_count(source.shape(name)) for name in source.names())


def agreements(truth: Network, subject: Network) -> list[Agreement]:
    """Hold two networks against each other in float32 and, where they differ by more than is allowed, in float64.

    What rounding alone makes of two orders of the same sums can exceed the allowed difference in float32 (and turn a
    router); it does not survive in float64, where the same rule decides. A fault does.
    """
    found = []
    for dtype in (torch.float32, torch.float64):
        wanted = truth.as_truth(dtype)
        ours = subject.compute(dtype, wanted)
        found.append(compare(wanted, ours, truth.name, subject.name, str(dtype).removeprefix("torch.")))
        if found[-1].passed:
            break
    return found
