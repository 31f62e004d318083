"""Mistakes an implementation of the LoRA options could have, to see that the tests notice them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch

from mindspeed_llm.lora import inject as inject_module
from mindspeed_llm.lora import layers, lookups


def local_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, group: Any) -> torch.Tensor:
    """|W + s B A| over this rank's inputs alone."""
    return (weight + scaling * b @ a).detach().norm(dim=1)


def unmarked(self: Any, settings: Any, module: str) -> None:
    """`adopt`, but the lengths are not known to see local tokens only."""
    ADOPT(self, settings, module)
    for magnitude in self.lora_magnitude_vector.values():
        magnitude.weight.sequence_parallel = False


def plain_scaling(self: Any, settings: Any, module: str) -> None:
    """`adopt`, but alpha / r under rsLoRA too."""
    ADOPT(self, settings, module)
    self.scaling["default"] = settings.alpha_of(module) / settings.rank(module)


def kept_base(self: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`factors`, but what PiSSA starts with is not taken out of the base."""
    return self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]


def frozen_copy(chunk: Any, settings: Any) -> None:
    """`set_trainable`, but modules named to be trained whole stay frozen."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(layers.is_lora_parameter(name))


def adapt_every_row(self: Any, rows: torch.Tensor) -> None:
    """`adapt_only`, but the other rows are trained too."""


def own_rows_of_b(self: Any, tokens: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`lookup`, but a token that another rank has gets a row of this rank's too."""
    rows = torch.nn.functional.embedding(tokens % b.size(0), b)
    return lookups.reduce_from_tensor_model_parallel_region(rows, group=self.group)


ADOPT = layers.ParallelLora.adopt
FAULTS: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "local-norms": lambda: mock.patch.object(layers, "row_norms", local_norms),
    "unmarked-lengths": lambda: mock.patch.object(layers.ParallelLora, "adopt", unmarked),
    "plain-scaling": lambda: mock.patch.object(layers.ParallelLora, "adopt", plain_scaling),
    "kept-base": lambda: mock.patch.object(layers.ParallelLora, "factors", kept_base),
    "every-row": lambda: mock.patch.object(layers.ParallelLora, "adapt_only", adapt_every_row),
    "unmasked-lookup": lambda: mock.patch.object(lookups.EmbeddingLora, "lookup", own_rows_of_b),
    "frozen-copy": lambda: mock.patch.object(inject_module, "set_trainable", frozen_copy),
}
