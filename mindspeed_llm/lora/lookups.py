"""LoRA on layers that are no linear layers to megatron-core: routers, and the table of token embeddings.

Shapes: s sequence, b batch, h hidden, e experts, v vocabulary, r rank; `/t` = divided by TP.

    router      W [e, h]    A [r, h]    B [e, r]               all replicated; logits and their share are float32
    embedding   W [v/t, h]  A [r, h] replicated  B [v/t, r]    row x of W + s B A

peft calls an embedding's factors lora_embedding_A = B^T [r, v] and lora_embedding_B = A^T [h, r].

A tied output layer stays the base's: as in peft, only the lookup is adapted.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from mindspeed_llm.lora.layers import ParallelLora, ReplicatedLora


class RouterLora(ReplicatedLora):
    """Adapter of a router, which every rank holds whole; always in the modular form."""

    @property
    def fuses(self) -> bool:
        """Never: what follows the product is the choice of experts."""
        return False

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[s/t, b, h] under sequence parallelism, else [s, b, h] -> the router's (weights, chosen), each [t, e].

        Args:
            padding_mask: [s, b], see `models.moe.Router.routing`.
        """
        if self.disable_adapters:
            return self.base_layer(x, padding_mask)
        a, b, scaling = self.factors()
        dropout = self.draw_dropout()
        seen = x.float() if dropout is None else x.float() * dropout.factors(x)
        return self.base_layer(x, padding_mask, self.delta(seen, a.float(), b.float(), scaling))


class EmbeddingLora(ParallelLora):
    """Adapter of the table of token embeddings, whose rows are split over TP; without dropout, as in peft."""

    kind = "column"
    split_factor = 1

    @staticmethod
    def sees_local_tokens(base_layer: nn.Module) -> bool:
        """Under sequence parallelism each rank gets the embeddings of its own positions."""
        return base_layer.reduce_scatter_embeddings

    def mark_parameters(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """A is replicated and sees local tokens only under sequence parallelism; B is split."""
        a.sequence_parallel = self.sequence_parallel
        set_tensor_model_parallel_attributes(b, True, 0, 1)

    @property
    def fuses(self) -> bool:
        """Never: a lookup is no product."""
        return False

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Numbers [b, s] -> [b, s, h], or [s/t, b, h] under sequence parallelism."""
        out = self.base_layer(tokens, *args, **kwargs)
        if self.disable_adapters:
            return out
        a, b, scaling = self.factors()
        return out + (linear(self.lookup(tokens, b), a.t()) * scaling).to(out.dtype)

    def lookup(self, tokens: Tensor, b: Tensor) -> Tensor:
        """The tokens' rows of B, in the layout of the base's output with r for h.

        One rank has a token's row, the others add zeros: the sum is exact in every type.
        """
        base = self.base_layer
        if self.group.size() == 1:
            rows = embedding(tokens, b)
        else:
            elsewhere = (tokens < base.vocab_start_index) | (tokens >= base.vocab_end_index)
            rows = embedding((tokens - base.vocab_start_index).masked_fill(elsewhere, 0), b)
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.group)


def normal_init(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """The initial values of an embedding's A, float32 [r, h]: standard normal, as peft draws its lora_embedding_B."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
