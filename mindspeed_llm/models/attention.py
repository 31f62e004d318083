"""The attention of our layer specs: megatron-core's interface, our rotary embedding, the device's kernel.

Shapes: s sequence, b batch, n query heads, g key-value heads, d head dimension; `/t` = divided by TP.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mindspeed_llm.device.base import Device
from mindspeed_llm.device.rowwise import rotate
from mindspeed_llm.models import context
from mindspeed_llm.models.config import ModelConfig


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention, turned by `models.rope.Rotary`'s table instead of its own angles.

    Keys are cached before they are turned: where frequencies depend on the length (longrope, dynamic), a cached
    sequence is computed as one seen at once.
    """

    def __init__(self, *args: Any, model: ModelConfig, layer: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interleaved = model.rotary_interleaved
        local = model.rotary_base_local is not None and model.window(layer) is not None
        self.rope_kind = 1 if local else 0

    def _adjust_key_value_for_inference(self, *args: Any, **kwargs: Any) -> tuple:
        """megatron-core's: join with the cache; then turn q and k, so that it has nothing left to turn."""
        query, key, value, tables, mask_type, block_table = super()._adjust_key_value_for_inference(*args, **kwargs)
        if tables is not None:
            query = rotate(query, tables[0][:, self.rope_kind], self.interleaved)
            key = rotate(key, tables[1][:, self.rope_kind], self.interleaved)
        return query, key, value, None, mask_type, block_table


class CoreAttention(MegatronModule):
    """Causal scaled dot-product attention, with the window, cap and sinks of the layer.

    Rows are padded on the right only, so the causal mask alone keeps every real token from seeing padding; no mask
    tensor is built. Packed rows are segments of one sequence. megatron-core's `DotProductAttention` computes softmax
    unfused (26-37 % of a step on a CPU).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        device: Device,
        model: ModelConfig,
        layer: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.kernel = device.attention
        self.cp_group = None if pg_collection is None else getattr(pg_collection, "cp", None)
        own = model.attention_scale if softmax_scale is None else softmax_scale
        self.features: dict[str, Any] = {
            "causal": True,
            "scale": config.kv_channels**-0.5 if own is None else own,
            "window": model.window(layer),
            "softcap": model.attention_softcap,
        }
        self.softmax_offset: torch.nn.Parameter | None = None
        if model.attention_sinks:
            heads = model.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

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
        """[s, b, n/t, d], [s, b, g/t, d] x 2 -> [s, b, n/t * d]; `packed_seq_params` is a `PackedRows`, or None."""
        if self.cp_group is not None and self.cp_group.size() > 1:
            features = {"sinks": self.softmax_offset, **self.features}
            rows = None if packed_seq_params is None else packed_seq_params.rows_cut
            return context.attend(self.kernel, query, key, value, self.cp_group, rows, **features).flatten(2)
        heads_first = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        segments = None if packed_seq_params is None else packed_seq_params.segments
        out = self.kernel(*heads_first, sinks=self.softmax_offset, segments=segments, **self.features)
        s, b = query.shape[:2]
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)
