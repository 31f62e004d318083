"""The attention core of our layer specs: megatron-core's interface, the device's kernel.

Shapes: s sequence, b batch, n query heads, g key-value heads, d head dimension; `/t` = divided by TP.
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mindspeed_llm.device.base import Device


class CoreAttention(MegatronModule):
    """Causal scaled dot-product attention.

    Rows are padded on the right only, so the causal mask alone keeps every real token from seeing padding; no mask
    tensor is built. megatron-core's `DotProductAttention` computes softmax unfused (26-37 % of a step on a CPU).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        device: Device,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.kernel = device.attention
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[s, b, n/t, d], [s, b, g/t, d] x 2 -> [s, b, n/t * d]."""
        out = self.kernel(
            query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), causal=True, scale=self.scale
        )
        s, b = query.shape[:2]
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)
