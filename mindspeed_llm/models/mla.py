"""Multi-head latent attention (DeepSeek): keys and values come from one low-rank projection of the hidden state.

    q = up(norm(down(x))), or one plain projection         kv, k_rotated = down(x)         k, v = up(norm(kv))

The down projections are small and every rank holds them whole, as upstream's checkpoints do; megatron-core's own module
splits them unless TransformerEngine is there, and its yarn is not transformers'. A cache holds whole keys and values.

Shapes: s sequence, b batch, h hidden, n heads, d part of a head without position, r rotated part, v value head;
`/t` = divided by TP.
"""

from copy import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from torch import Tensor

from mindspeed_llm.device.base import Device
from mindspeed_llm.device.rowwise import rotate
from mindspeed_llm.models.attention import CoreAttention
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import ReplicatedLinear
from mindspeed_llm.models.rope import Rotary

LATENT_NORM_EPSILON = 1e-6
"""Of the norms between down and up projection: transformers and DeepSeek's own code do not take it from config.json."""


def latent_options(model: ModelConfig) -> dict[str, Any]:
    """Fields of megatron-core's `MLATransformerConfig` that describe latent attention."""
    return {
        "q_lora_rank": model.q_lora_rank or None,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": "rope",  # not used: the angles come from `models.rope`
    }


def latent_attention_spec(model: ModelConfig, layer: int, device: Device) -> ModuleSpec:
    """Latent attention of a layer (its global number)."""
    core = {"device": device, "model": model, "layer": layer}
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "model": model, "device": device},
        submodules=MLASelfAttentionSubmodules(
            core_attention=ModuleSpec(module=LatentCore, params=core), linear_proj=RowParallelLinear
        ),
    )


class LatentCore(CoreAttention):
    """The attention core, scaled by the size of a query head, which is not that of a value head."""

    def __init__(self, *args: Any, model: ModelConfig, softmax_scale: float | None = None, **kwargs: Any) -> None:
        scale = model.kv_channels**-0.5 if model.attention_scale is None else model.attention_scale
        super().__init__(*args, model=model, softmax_scale=scale, **kwargs)


class LatentRotary(Rotary):
    """Cosines and sines of the rotated part of a head."""

    def __init__(self, model: ModelConfig, device: torch.device, cp_group: Any) -> None:
        super().__init__(model, device, cp_group)
        self.size = model.qk_pos_emb_head_dim


class LatentAttention(Attention):
    """megatron-core's attention (core, cache, output projection) over latent projections."""

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *,
        model: ModelConfig,
        device: Device,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        own = copy(config)
        own.kv_channels = model.v_head_dim  # what the core gives and the output projection takes
        super().__init__(own, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection)
        self.model = model
        self.key_hidden_size = model.kv_channels  # of the cache
        place = device.torch_device(torch.distributed.get_node_local_rank(0))
        self.rotary_pos_emb = LatentRotary(model, place, self.pg_collection.cp)
        sizes, hidden = model.dimensions(), model.hidden_size
        if model.q_lora_rank:
            self.linear_q_down_proj = ReplicatedLinear(config, hidden, model.q_lora_rank)
            self.q_layernorm = self.latent_norm(device, model.q_lora_rank)
            self.linear_q_up_proj = self.split_linear(model.q_lora_rank, sizes["q_up"])
        else:
            self.linear_q_proj = self.split_linear(hidden, sizes["q_up"])
        self.linear_kv_down_proj = ReplicatedLinear(config, hidden, sizes["kv_down"])
        self.kv_layernorm = self.latent_norm(device, model.kv_lora_rank)
        self.linear_kv_up_proj = self.split_linear(model.kv_lora_rank, sizes["kv_up"])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [s/t, b, h] under sequence parallelism, else [s, b, h] -> (the same shape, no bias)."""
        query, key, value = self.get_query_key_value_tensors(
            hidden_states, inference_context=inference_context, packed_seq_params=packed_seq_params
        )
        query, key, value, _, mask_type, _ = self._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb=None
        )
        if self.checkpoint_core_attention and self.training:
            out = self._checkpointed_attention_forward(
                query, key, value, attention_mask, attn_mask_type=mask_type, packed_seq_params=packed_seq_params
            )
        else:
            out = self.core_attention(
                query, key, value, attention_mask, attn_mask_type=mask_type, packed_seq_params=packed_seq_params
            )
        return self.linear_proj(out)

    def latent_norm(self, device: Device, size: int) -> torch.nn.Module:
        """The norm of a latent vector."""
        return device.rms_norm(config=self.config, hidden_size=size, eps=LATENT_NORM_EPSILON)

    def split_linear(self, in_features: int, out_features: int) -> ColumnParallelLinear:
        """A projection to the heads, which ranks share."""
        return ColumnParallelLinear(
            in_features,
            out_features,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [s/t, b, h] to q [s, b, n/t, d + r], k the same, v [s, b, n/t, v]."""
        model, heads = self.model, self.num_attention_heads_per_partition
        rotated = model.qk_pos_emb_head_dim
        latent_q = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0]) if model.q_lora_rank else hidden_states
        q, _ = (self.linear_q_up_proj if model.q_lora_rank else self.linear_q_proj)(latent_q)
        q = q.unflatten(-1, (heads, model.qk_head_dim + rotated))
        latent, k_rotated = self.linear_kv_down_proj(hidden_states)[0].split([model.kv_lora_rank, rotated], dim=-1)
        latent = self.kv_layernorm(latent)
        kv = self.linear_kv_up_proj(latent)[0].unflatten(-1, (heads, model.qk_head_dim + model.v_head_dim))
        k, v = kv.split([model.qk_head_dim, model.v_head_dim], dim=-1)
        k_rotated = self.shared_by_heads(k_rotated).unsqueeze(2)  # [s, b, 1, r]
        offset = 0 if inference_context is None else inference_context.sequence_len_offset
        whole = q.size(0) * self.config.context_parallel_size
        positions = whole if packed_seq_params is None else packed_seq_params
        table = self.rotary_pos_emb(positions, offset)[:, 0]  # [s, 2, r]
        q_plain, q_rotated = q.split([model.qk_head_dim, rotated], dim=-1)
        q_rotated, k_rotated = (rotate(one, table, model.rotary_interleaved) for one in (q_rotated, k_rotated))
        query = torch.cat([q_plain, q_rotated], dim=-1)
        key = torch.cat([k, k_rotated.expand(-1, -1, heads, -1)], dim=-1)
        return query, key, v.contiguous()

    def shared_by_heads(self, k_rotated: Tensor) -> Tensor:
        """The rotated key part, whole on every rank [s, b, r]; its gradient is the sum over the ranks' heads."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(k_rotated, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(k_rotated, group=self.pg_collection.tp)
