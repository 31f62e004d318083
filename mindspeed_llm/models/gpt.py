"""The live network: megatron-core's GPTModel through local specs, dimensions from `ModelConfig`."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn.functional import gelu, silu

from mindspeed_llm.device.base import Device
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.expert_marks import mark_expert_parameter
from mindspeed_llm.models.layer import layer_spec
from mindspeed_llm.models.linear import PartialSumLinear
from mindspeed_llm.models.mla import latent_options
from mindspeed_llm.models.moe import moe_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (Gemma)."""
    return gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"activation_func": silu},
    "gelu_tanh": {"activation_func": gelu_tanh},
    "clamped_swiglu": {  # (up + 1) x gate x sigmoid(1.702 gate), both clamped at 7 (gpt-oss)
        "activation_func": quick_gelu,
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
    },
}
"""`ModelConfig.activation` -> the fields of megatron-core's configuration that make it."""


@dataclass(frozen=True)
class EngineOptions:
    """How the network is spread over processes and which memory it trades for time.

    Attributes:
        tensor, pipeline: TP and PP sizes.
        context: processes over which a sequence is cut (CP).
        expert: processes over which the experts are spread (EP).
        expert_tensor: processes over which each expert is cut (ETP); None for as many as `tensor`.
        layers_per_virtual_stage: layers of one model chunk under interleaved pipelining; None for one chunk a stage.
        sequence_parallel: split activations along the sequence between TP regions.
        dtype: of parameters and activations.
        moe_aux_loss: coefficient of the load-balancing loss in training; 0 for none.
        moe_aux_loss_type: over the tokens of a micro-batch ("aux_loss") or of each row ("seq_aux_loss").
        grouped_experts: compute a rank's experts together; else one after another.
        moe_z_loss: coefficient of the loss that keeps router logits small; None for none.
        variable_seq_lengths: micro-batches may differ in length, so pipeline stages send shapes first.
        recompute_granularity, recompute_method, recompute_num_layers: megatron-core's recomputation options.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    layers_per_virtual_stage: int | None = None
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    variable_seq_lengths: bool = True
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    calculate_per_token_loss: bool = False
    moe_aux_loss: float = 0.0
    moe_aux_loss_type: str = "aux_loss"
    moe_z_loss: float | None = None
    grouped_experts: bool = True

    def virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks per pipeline stage, or None without interleaving."""
        if self.layers_per_virtual_stage is None:
            return None
        return num_layers // self.pipeline // self.layers_per_virtual_stage


def transformer_config(model: ModelConfig, engine: EngineOptions, device: Device) -> TransformerConfig:
    """megatron-core's configuration of `model`; parameters are left uninitialised, a checkpoint always follows."""
    virtual = engine.virtual_stages(model.num_layers)
    latent = latent_options(model) if model.multi_latent_attention else {}
    return (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=model.qk_layernorm,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        add_bias_linear=False,  # the layer's spec says which linear layer has a bias
        gated_linear_unit=True,
        **ACTIVATIONS[model.activation],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=engine.tensor,
        pipeline_model_parallel_size=engine.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=engine.context,
        sequence_parallel=engine.sequence_parallel and engine.tensor > 1,
        # megatron-core 0.16.1 is silently wrong under interleaving with its default point-to-point settings.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        variable_seq_lengths=engine.variable_seq_lengths,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, in dense models too
        pipeline_dtype=engine.dtype,
        params_dtype=engine.dtype,
        bf16=engine.dtype == torch.bfloat16,
        fp16=False,
        perform_initialization=False,
        recompute_granularity=engine.recompute_granularity,
        recompute_method=engine.recompute_method,
        recompute_num_layers=engine.recompute_num_layers,
        calculate_per_token_loss=engine.calculate_per_token_loss,
        expert_model_parallel_size=engine.expert,
        expert_tensor_parallel_size=engine.expert_tensor or engine.tensor,
        moe_aux_loss_coeff=engine.moe_aux_loss,
        moe_router_load_balancing_type=engine.moe_aux_loss_type,
        moe_z_loss_coeff=engine.moe_z_loss,
        **latent,
        **moe_options(model),
        **device.engine_config,
    )


def build_chunks(model: ModelConfig, engine: EngineOptions, device: Device) -> list[CausalLM]:
    """This rank's model chunks, with uninitialised parameters on the device.

    megatron-core's process groups must exist (`models.parallel.start`). One chunk, or one per virtual stage; each
    carries `first_layer`, the global number of its first decoder layer.
    """
    config = transformer_config(model, engine, device)
    stages = config.virtual_pipeline_model_parallel_size
    grouped = engine.grouped_experts
    return [_build_chunk(model, config, device, vp, grouped) for vp in (range(stages) if stages else [None])]


def _build_chunk(
    model: ModelConfig, config: TransformerConfig, device: Device, vp_stage: int | None, grouped: bool
) -> CausalLM:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    layers = config.num_layers // config.pipeline_model_parallel_size
    if vp_stage is not None:
        layers //= config.virtual_pipeline_model_parallel_size
    first_layer = get_transformer_layer_offset(config, vp_stage, pp_rank)
    spec: Any = TransformerBlockSubmodules(
        layer_specs=[layer_spec(model, first_layer + layer, device, grouped) for layer in range(layers)],
        layer_norm=device.rms_norm,
    )
    place = device.torch_device(torch.distributed.get_node_local_rank(0))
    chunk = CausalLM(model, config, spec, place, first=first, last=last, vp_stage=vp_stage)
    chunk.first_layer = first_layer
    mark_split_weights(chunk)
    return chunk.to(place)


def mark_split_weights(chunk: torch.nn.Module) -> None:
    """Give split weights the mark by which megatron-core counts them on every TP rank in the gradient norm.

    megatron-core sets it while initialising weights, which is skipped here because a checkpoint always follows.
    """
    split = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1, PartialSumLinear: 1}
    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        if type(module) not in split or weight is None:
            continue
        if getattr(module, "is_expert", False):
            mark_expert_parameter(weight, module.tp_group, split[type(module)])
            if module.bias is not None:
                mark_expert_parameter(module.bias, module.tp_group, 0 if split[type(module)] == 0 else None)
        elif not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, split[type(module)], 1)
