"""What pool processes run for the torch_dist tests: megatron-core's own GPTModel and its own dist_checkpointing."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core import optimizer as core_optimizer
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from mindspeed_llm import device
from mindspeed_llm.models import parallel
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.training.optimizer_state import FIELDS, export_state


class Local(NamedTuple):
    """One rank's parameters and buffers by local name, and where the rank stands."""

    tensors: dict[str, np.ndarray]
    first_layer: int
    tp_rank: int
    expert_place: tuple[int, int, int, int]


@contextlib.contextmanager
def groups(tp: int, pp: int, ep: int) -> Iterator[None]:
    """megatron-core's process groups; expert tensor parallel size is 1 where experts are spread."""
    parallel.start(device.select("cpu"), tp, pp, expert=ep, expert_tensor=1 if ep > 1 else tp)
    try:
        yield
    finally:
        parallel.stop()


@contextlib.contextmanager
def may_have_children() -> Iterator[None]:
    """Saving starts processes of its own, which a daemon may not."""
    settings = multiprocessing.current_process()._config
    kept, settings["daemon"] = settings.get("daemon"), False
    try:
        yield
    finally:
        settings["daemon"] = kept


class NoCore(torch.nn.Module):
    """In place of the attention's core, which has no weights and does not know latent attention's arguments."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def transformer_config(model: ModelConfig, tp: int, pp: int, ep: int) -> TransformerConfig:
    """A megatron-core configuration with the parameters of `model`."""
    options: dict[str, Any] = {}
    if model.num_experts:
        options |= {
            "num_moe_experts": model.num_experts,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "moe_router_topk": model.moe_router_topk,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_enable_expert_bias": model.moe_expert_bias,
            "moe_router_score_function": model.moe_router_score,
            "moe_shared_expert_intermediate_size": model.moe_shared_ffn_hidden_size or None,
        }
        if len(model.moe_layers) < model.num_layers:
            options["moe_layer_freq"] = [int(layer in model.moe_layers) for layer in range(model.num_layers)]
    if model.multi_latent_attention:
        names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        options |= {name: getattr(model, name) for name in names} | {"rope_type": "rope"}
    return (MLATransformerConfig if model.multi_latent_attention else TransformerConfig)(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        qk_layernorm=model.qk_layernorm or model.multi_latent_attention,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else tp,
        sequence_parallel=False,
        pipeline_dtype=torch.float32,
        mtp_num_layers=model.mtp_num_layers or None,
        use_cpu_initialization=True,
        perform_initialization=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **options,
    )


def build(model: ModelConfig, tp: int = 1, pp: int = 1, ep: int = 1, bf16: bool = False) -> GPTModel:
    """megatron-core's own model, by its own local layer specification, filled with a number that is no weight."""
    config = transformer_config(model, tp, pp, ep)
    if bf16:
        config.bf16, config.params_dtype = True, torch.bfloat16
    if model.num_experts:
        spec = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
        for layer in spec.layer_specs if model.multi_latent_attention else ():
            layer.submodules.self_attention.submodules.core_attention = NoCore
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    # Its latent attention asks whether a layer is transformer_engine's, which is not there to ask for.
    with mock.patch.object(multi_latent_attention, "TELinear", NoCore):
        built = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=-(-model.vocab_size // tp) * tp,
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
            mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
            if model.mtp_num_layers
            else None,
        )
    with torch.no_grad():
        for tensor in weights(built).values():
            tensor.fill_(-77.0)
    return built.bfloat16() if bf16 else built


def weights(built: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name."""
    state = built.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def local(built: GPTModel, pp: int) -> Local:
    """Copies of this rank's tensors."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return Local(
        {name: value.detach().float().numpy().copy() for name, value in weights(built).items()},
        rank * (built.config.num_layers // pp),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel.expert_place(built.config.num_moe_experts or 0),
    )


def save(
    rank: int,
    model: ModelConfig,
    folder: Path,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    metadata: dict | None = None,
    optimizer: bool = False,
    common: dict | None = None,
) -> Local:
    """Save a model of random weights; -> this rank's weights."""
    with groups(tp, pp, ep), may_have_children():
        built = build(model, tp, pp, ep)
        generator = torch.Generator().manual_seed(rank + 1)
        replicated = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for name, tensor in weights(built).items():
                split = getattr(tensor, "tensor_model_parallel", False) or ".local_experts." in name
                tensor.copy_(torch.randn(tensor.shape, generator=generator if split else replicated))
        content = {"model": built.sharded_state_dict(metadata=metadata), **(common or {})}
        if optimizer:
            moment = torch.randn(5, 3)
            content["optimizer"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.x", moment)
            content["rng"] = ShardedObject("rng_state", [1, 2], (1,), (0,))
        dist_checkpointing.save(content, str(folder))
        return local(built, pp)


def load(
    rank: int, model: ModelConfig, folder: Path, tp: int = 1, pp: int = 1, ep: int = 1, metadata: dict | None = None
) -> tuple[Local, list[str], dict]:
    """Load a checkpoint; -> this rank's weights, keys the checkpoint lacks, and its common part."""
    with groups(tp, pp, ep):
        built = build(model, tp, pp, ep)
        asked = {"model": built.sharded_state_dict(metadata=metadata)}
        found, _, lacking = dist_checkpointing.load(asked, str(folder), strict="return_all")
        built.load_state_dict(found.pop("model"))
        return local(built, pp), sorted(lacking), found


class Resumed(NamedTuple):
    """What megatron-core's own model and optimizer hold after loading, on one rank.

    Attributes:
        held: weights, and where the rank stands.
        state: field -> values by local name, of parameters this rank updates as a whole.
        groups: of the optimizers' parameters, without these.
        steps: of Adam, as its state counts them.
    """

    held: Local
    state: dict[str, dict[str, np.ndarray]]
    groups: list[dict[str, Any]]
    steps: set[float]


class GroupsAdam(torch.optim.Optimizer):
    """In place of the fused Adam of apex and transformer_engine, which counts steps in its groups; it never steps."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)


@contextlib.contextmanager
def step_in_groups() -> Iterator[None]:
    """megatron-core's distributed optimizer as with a fused Adam: with torch's it loads nothing at all (0.16.1)."""
    with (
        mock.patch.object(core_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        mock.patch.object(core_optimizer, "Adam", GroupsAdam),
        mock.patch.object(distrib_optimizer, "Adam", GroupsAdam),
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True),
    ):
        yield


def load_into(built: GPTModel, optimizer: Any, folder: Path) -> None:
    """Load everything a checkpoint has of a model and its optimizer."""
    about = dist_checkpointing.load_content_metadata(str(folder))
    asked = {"model": built.sharded_state_dict(metadata=about)}
    asked["optimizer"] = optimizer.sharded_state_dict(asked["model"], is_loading=True, metadata=about)
    found, _, lacking = dist_checkpointing.load(asked, str(folder), strict="return_all")
    assert not lacking, lacking
    built.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


def resume(
    rank: int,
    model: ModelConfig,
    folder: Path,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    bf16: bool = False,
    distributed: bool = False,
) -> Resumed:
    """Load weights and optimizer state as Megatron-LM does: what the checkpoint says of itself decides the form."""
    with groups(tp, pp, ep), step_in_groups() if distributed else contextlib.nullcontext():
        built = build(model, tp, pp, ep, bf16)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
        wrapped = DistributedDataParallel(built.config, ddp, built)
        settings = OptimizerConfig(
            optimizer="adam", lr=0.5, min_lr=0.0, bf16=bf16, params_dtype=built.config.params_dtype,
            use_distributed_optimizer=distributed,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
        load_into(built, optimizer, folder)
        inner = getattr(optimizer, "chained_optimizers", [optimizer])
        parameters = {name: one for name, one in built.named_parameters() if one.requires_grad}
        state, _ = export_state(optimizer, parameters)
        fields = {name: {local: one[name].numpy() for local, one in state.items()} for name in FIELDS}
        kept = [group for one in inner for group in one.optimizer.param_groups]
        counted = {float(one["step"]) for each in inner for one in each.optimizer.state.values() if "step" in one}
        plain = [{key: value for key, value in group.items() if key != "params"} for group in kept]
        return Resumed(local(built, pp), fields, plain, counted | {float(one["step"]) for one in kept if "step" in one})
