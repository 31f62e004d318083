"""A model ready to answer: base or base with adapter, at any TP and PP, one forward pass at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from mindspeed_llm.arguments.programs import LiveProgram
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.layout import ExpertShare, Layout
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.open import BaseSource, LoraSource, open_base
from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import UsageError
from mindspeed_llm.lora.inject import inject
from mindspeed_llm.lora.sources import live_obstacles, load_adapter, open_pair
from mindspeed_llm.models import parallel
from mindspeed_llm.models.causal_lm import IGNORE, CausalLM
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags
from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
from mindspeed_llm.models.rope import switches_between


@dataclass(frozen=True)
class Sources:
    """What a live model is made of.

    Attributes:
        base: the opened base. base_path: the folder named for it.
        adapter: or None.
        weights: what is loaded: the base, or the base merged with an adapter that live adapters cannot hold.
    """

    base: BaseSource
    base_path: str
    adapter: LoraSource | None
    weights: TensorSource

    @property
    def merged(self) -> bool:
        """Whether the adapter is part of `weights`."""
        return self.weights is not self.base


def open_sources(options: LiveProgram) -> Sources:
    """Open --load and --lora-load and hold the flags against them.

    Raises:
        UsageError: no --load, or a flag that contradicts the model or the adapter.
        InputError: nothing there, or an adapter of another base.
    """
    path, lora = options.checkpoint.load, options.lora
    if not path:
        raise UsageError("--load is missing: the HF model folder or Megatron checkpoint to run")
    adapter = None
    if lora.lora_load:
        base, adapter = open_pair(path, lora, options.model.model_type_hf)
    elif lora.lora_target_modules:
        raise UsageError("--lora-target-modules is given without --lora-load: there is no adapter to run")
    else:
        base = open_base(path, options.model.model_type_hf)
    check_architecture_flags(base.config, options.model, path)
    if options.parallel.num_layers_per_virtual_pipeline_stage is not None:
        raise UsageError("--num-layers-per-virtual-pipeline-stage is for training only; leave it out")
    if options.parallel.context_parallel_size != 1:
        size = options.parallel.context_parallel_size
        raise UsageError(f"--context-parallel-size {size} is for training only; leave it out")
    merge = adapter is not None and live_obstacles(adapter)
    return Sources(base, path, adapter, MergedSource(base, adapter) if merge else base)


class Cache(StaticInferenceContext):
    """megatron-core's cache of keys and values, which also knows the tokens it was made from.

    Attributes:
        tokens: [b, s], None while empty.
    """

    tokens: Tensor | None = None

    def swap_key_value_dict(self, batch_idx: Sequence[int]) -> None:
        """Row i becomes what row `batch_idx[i]` is."""
        super().swap_key_value_dict(batch_idx)
        if self.tokens is not None:
            self.tokens = self.tokens[list(batch_idx)]


class LiveModel:
    """One stage of the model on this rank, and the way a batch takes through all stages.

    Every rank calls the same methods with the same tokens; results are the same on every rank of a replica.
    """

    def __init__(self, chunk: CausalLM, config: ModelConfig, device: torch.device) -> None:
        self.chunk, self.config, self.device = chunk, config, device
        self.pipeline = parallel_state.get_pipeline_model_parallel_group()
        self.first = parallel_state.is_pipeline_first_stage()
        self.last = parallel_state.is_pipeline_last_stage()

    def _stage(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Run this stage on what the previous one sends and send on; -> its output, on the last stage the logits."""
        if not self.first:
            rows, length = tokens.shape
            hidden = torch.empty(
                length, rows, self.config.hidden_size, dtype=self.chunk.config.pipeline_dtype, device=self.device
            )
            previous = parallel_state.get_pipeline_model_parallel_prev_rank()
            torch.distributed.recv(hidden, previous, group=self.pipeline)
            self.chunk.set_input_tensor(hidden)
        out = self.chunk(tokens, None, None, runtime_gather_output=True, **kwargs)
        if not self.last:
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            torch.distributed.send(out.contiguous(), following, group=self.pipeline)
        return out

    def _from_last(self, values: Tensor) -> Tensor:
        """The last stage's values on every stage."""
        if self.pipeline.size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(values, source, group=self.pipeline)
        return values

    def cache(self, rows: int, length: int) -> Cache:
        """An empty key-value cache for `rows` sequences of at most `length` tokens."""
        return Cache(rows, length)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """Logits [b, v] fp32 behind the last token of each row.

        Args:
            tokens: [b, s], what follows the cached tokens, or whole rows without a cache.
        """
        if cache is not None:
            before = cache.sequence_len_offset
            whole = tokens if cache.tokens is None else torch.cat([cache.tokens, tokens], 1)
            if before and switches_between(self.config, before, whole.size(1)):
                cache.reset()  # longer than the short frequencies are for: start again with the long ones
                tokens = whole
            cache.tokens = whole
        logits = torch.empty(tokens.size(0), self.config.vocab_size, device=self.device)
        out = self._stage(tokens, inference_context=cache)
        if self.last:
            logits.copy_(out[:, -1, : self.config.vocab_size])
        if cache is not None:
            cache.sequence_len_offset += tokens.size(1)
            cache.enable_decode_mode()
        return self._from_last(logits)

    @torch.no_grad()
    def log_probabilities(
        self, rows: Sequence[Sequence[int]], lengths: Sequence[int], finals: Sequence[Sequence[int]]
    ) -> list[list[tuple[float, bool]]]:
        """Score continuations that differ in their last token only.

        Args:
            rows: tokens of each row without the last one of its continuation.
            lengths: tokens of each continuation, the last one included.
            finals: last tokens to score for each row; they share the row's forward pass.

        Returns:
            For each row and final token (sum of the continuation's log-probabilities, all of it greedily chosen). Rows
            are padded on the right; the causal mask keeps padding out of every real token's sight.
        """
        longest = max(len(row) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORE)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            labels[i, len(row) - length : len(row) - 1] = torch.tensor(row[len(row) - length + 1 :], dtype=torch.long)
            labels[i, len(row) - 1] = 0  # where the final token is predicted; its own labels are `finals`
        self.chunk.answers_logits = True
        try:
            logits = self._stage(tokens.to(self.device), labels=labels.to(self.device))
        finally:
            self.chunk.answers_logits = False
        widest = max(len(final) for final in finals)
        result = torch.zeros(len(rows), widest, 2, dtype=torch.float32, device=self.device)
        if self.last:
            scores = torch.log_softmax(logits.float(), -1)
            owner = (labels.transpose(0, 1).reshape(-1) != IGNORE).nonzero().squeeze(1) % len(rows)
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                own = scores[owner.to(scores.device) == i]  # [length, v], in the order of positions
                shared = torch.tensor(list(row[len(row) - length + 1 :]), dtype=torch.long, device=own.device)
                before = own[:-1].gather(1, shared.unsqueeze(1)).sum()
                greedy = bool((own[:-1].argmax(-1) == shared).all())
                for j, final in enumerate(finals[i]):
                    result[i, j, 0] = before + own[-1, final]
                    result[i, j, 1] = float(greedy and int(own[-1].argmax()) == final)
        values = self._from_last(result).tolist()
        return [
            [(total, chosen == 1.0) for total, chosen in row[: len(final)]]
            for row, final in zip(values, finals, strict=True)
        ]


def live_dtype(options: LiveProgram, sources: Sources) -> torch.dtype:
    """Compute type: the flag's, else that of the base's weights."""
    if options.bf16 or options.fp32:
        return torch.bfloat16 if options.bf16 else torch.float32
    return DTYPES[sources.base.config.dtype]


def load_model(options: LiveProgram, sources: Sources, device: Device) -> LiveModel:
    """Build this rank's stage and load base and adapter into it; the process groups are created here."""
    config, cut = sources.weights.config, options.parallel
    tensor, pipeline = cut.tensor_model_parallel_size, cut.pipeline_model_parallel_size
    expert, expert_tensor = cut.expert_model_parallel_size, cut.expert_tensor_parallel_size
    layout = Layout.create(config.num_layers, tensor, pipeline, ep=expert, etp=expert_tensor)  # refuses what is odd
    layout.check_experts(config.num_experts)
    for entry in sources.weights.table.entries.values():
        entry.shard_map(tensor if entry.expert is None else layout.etp, None)
    minutes = options.device.distributed_timeout_minutes
    parallel.start(device, tensor, pipeline, None, options.seed, minutes, expert, expert_tensor)
    engine = EngineOptions(
        tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor, dtype=live_dtype(options, sources)
    )
    chunks = build_chunks(config, engine, device)
    rank = parallel_state.get_tensor_model_parallel_rank()
    experts = ExpertShare(*parallel.expert_place(config.num_experts))
    first = chunks[0].first_layer
    load_live(live_tensors(chunks[0]), sources.weights, rank, tensor, first, experts=experts)
    if sources.adapter is not None and not sources.merged:
        inject(chunks, sources.adapter.live_settings, fused=True, seed=0, fresh=False)
        load_adapter(chunks[0], sources.adapter, rank, tensor, experts)
    chunks[0].eval()
    return LiveModel(chunks[0], config, device.torch_device(torch.distributed.get_node_local_rank(0)))
