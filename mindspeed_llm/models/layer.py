"""One decoder layer as megatron-core builds it: which modules, chosen by the model's features.

x + norm?(attention(norm(x))), then x + norm?(mlp(norm(x)))        norm? where the model has post norms
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor, nn

from mindspeed_llm.device.base import Device
from mindspeed_llm.models.attention import CoreAttention, RotarySelfAttention
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import with_bias
from mindspeed_llm.models.mla import latent_attention_spec
from mindspeed_llm.models.mlp import GatedMLP
from mindspeed_llm.models.moe import expert_mlp_spec


class NormedSum:
    """The residual sum of megatron-core's layer with a norm of the branch before it.

    Takes the place of a bias-dropout-add: `(training, fused) -> ((output, bias), residual, dropout) -> sum`. It holds
    the layer's norm but is no module, so that the norm's name stays the layer's.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, training: bool, fused: bool) -> Any:
        """The function that adds."""
        return self.add

    def add(self, branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        """residual + norm(output + bias); dropout is 0 in every configuration made here."""
        output, bias = branch
        return residual + self.norm(output if bias is None else output + bias)


class DecoderLayer(TransformerLayer):
    """megatron-core's layer, with norms after attention and MLP where `post_norm` is given."""

    def __init__(self, *args: Any, post_norm: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if post_norm is None:
            return
        size, epsilon = self.config.hidden_size, self.config.layernorm_epsilon
        self.post_attn_norm = post_norm(config=self.config, hidden_size=size, eps=epsilon)
        self.post_mlp_layernorm = post_norm(config=self.config, hidden_size=size, eps=epsilon)
        self.self_attn_bda = NormedSum(self.post_attn_norm)
        self.mlp_bda = NormedSum(self.post_mlp_layernorm)


def attention_spec(model: ModelConfig, layer: int, device: Device) -> ModuleSpec:
    """Grouped-query attention of a layer (its global number)."""
    qk_norm = device.rms_norm if model.qk_layernorm else IdentityOp
    core = {"device": device, "model": model, "layer": layer}
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "model": model, "layer": layer},
        submodules=SelfAttentionSubmodules(
            linear_qkv=with_bias(ColumnParallelLinear, model.add_qkv_bias),
            core_attention=ModuleSpec(module=CoreAttention, params=core),
            linear_proj=with_bias(RowParallelLinear, model.add_proj_bias),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def mlp_spec(model: ModelConfig) -> ModuleSpec:
    """The gated MLP of a dense layer."""
    return ModuleSpec(
        module=GatedMLP,
        submodules=MLPSubmodules(
            linear_fc1=with_bias(ColumnParallelLinear, model.add_mlp_bias),
            linear_fc2=with_bias(RowParallelLinear, model.add_mlp_bias),
        ),
    )


def layer_spec(model: ModelConfig, layer: int, device: Device, grouped_experts: bool = True) -> ModuleSpec:
    """Decoder layer number `layer` (global, from 0); its experts computed together, or one after another."""
    grouped = device.grouped if grouped_experts else None
    attention = latent_attention_spec if model.multi_latent_attention else attention_spec
    return ModuleSpec(
        module=DecoderLayer,
        params={"post_norm": device.rms_norm if model.post_norms else None},
        submodules=TransformerLayerSubmodules(
            input_layernorm=device.rms_norm,
            self_attention=attention(model, layer, device),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=device.rms_norm,
            mlp=expert_mlp_spec(model, grouped) if model.has("moe", layer) else mlp_spec(model),
            mlp_bda=get_bias_dropout_add,
        ),
    )
