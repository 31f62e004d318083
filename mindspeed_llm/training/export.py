"""`--save-safetensors`: what training saves for others, an HF folder or a PEFT adapter, straight from the live model.

    every rank plans the same files -> rank 0 lays them out -> each tensor is brought together on one rank of its
    tensor-parallel group, merged with its adapter, written at its place -> what all ranks wrote is counted

The work goes round the ranks of a group and the data-parallel replicas. A rank holds one whole tensor at a time, on
the CPU; its device holds one further share. Where training is not to wait for files (--async-save), each rank first
brings all tensors together that it writes: at TP above 1 that takes memory for their other shares.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.adapters.export import write_peft
from mindspeed_llm.checkpoint.adapters.factors import AdapterTensors, Assembled
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.adapters.stored import show_stored
from mindspeed_llm.checkpoint.adapters.tied import untied_model
from mindspeed_llm.checkpoint.convert_job import recorded_folders
from mindspeed_llm.checkpoint.formats.hf import HfFiles, HFSource, copy_companions
from mindspeed_llm.checkpoint.formats.lazy import InMemory, TensorSource
from mindspeed_llm.checkpoint.formats.mcore_names import lora_rank
from mindspeed_llm.checkpoint.live import live_axis, live_tensors
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import adapter_of, config_differences, open_checkpoint
from mindspeed_llm.checkpoint.sizes import parse_size
from mindspeed_llm.checkpoint.tables import (
    EMBEDDING,
    MAGNITUDE,
    OUTPUT_LAYER,
    WeightTable,
    expert_number,
    is_lora,
    logical_name,
)
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models import parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.training.start import Start

T = TypeVar("T")
MODEL_FOLDER, ADAPTER_FOLDER = "hf", "peft"
"""Where they lie in an iteration folder."""
FACTORS = ("lora_A", "lora_B", "lora_A_start", "lora_B_start", MAGNITUDE)


@dataclass(frozen=True)
class Export:
    """What is to be written beside the rank files of every checkpoint.

    Attributes:
        shard_bytes: limit of one file of weights.
        model, adapter: whether the (merged) model and the adapter are written.
        origin: the HF folder that gives config, tokenizer and chat template; None where only an adapter is written.
        base_path: what peft is to load the base from.
        settings: of the adapter; None in full tuning.
    """

    shard_bytes: int
    model: bool
    adapter: bool
    origin: Path | None
    base_path: str
    settings: LoraSettings | None


def plan_export(options: PosttrainOptions, start: Start) -> Export | None:
    """What --save-safetensors asks for; None without it.

    Raises:
        UsageError: --max-shard-size is no size, or no HF folder is known that would give config and tokenizer.
        InputError: the folder is that of another model.
    """
    if not options.checkpoint.save_safetensors:
        return None
    shard_bytes = parse_size(options.checkpoint.max_shard_size, "--max-shard-size")
    lora = start.settings is not None
    model = not (lora and options.lora.lora_ckpt_filter)
    origin = origin_folder(options, start)
    if origin is None and model:
        raise UsageError(
            f"--save-safetensors: {start.base_path} records no HF folder that still exists, which would give config and"
            " tokenizer; name one with --tokenizer-name-or-path"
        )
    if origin is not None:
        differing = config_differences(ModelConfig.from_hf(origin), start.base.config)
        if differing:
            raise InputError(f"{origin}: config.json is of another model than {start.base_path}: {differing}")
    base_path = str((origin or Path(start.base_path)).resolve())
    return Export(shard_bytes, model, lora, origin, base_path, start.settings)


def origin_folder(options: PosttrainOptions, start: Start) -> Path | None:
    """The HF folder of the base: what is loaded, what its conversion recorded, or where the tokenizer lies."""
    if isinstance(start.base, HFSource):
        return start.base.path
    tokenizer = options.tokenizer.tokenizer_name_or_path
    given = [Path(tokenizer)] if tokenizer and (Path(tokenizer) / "config.json").is_file() else []
    return next(iter([*recorded_folders(start.base, start.adapter), *given]), None)


def export_adapter(checkpoint: Path, export: Export) -> str:
    """Write the PEFT folder of a checkpoint whose rank files and args.json are complete; one process does it.

    -> one line on what was written and which servers take it.
    """
    adapter = adapter_of(open_checkpoint(checkpoint))
    return write_peft(adapter, checkpoint / ADAPTER_FOLDER, export.base_path)


def exported_model(model: ModelConfig, settings: LoraSettings | None) -> ModelConfig:
    """The model that a run writes, of the one it trains."""
    model = replace(model, mtp_num_layers=0)  # prediction layers are neither trained nor in the live model
    adapts_lookup = settings is not None and settings.adapts(EMBEDDING.removesuffix(".weight"))
    return untied_model(model) if adapts_lookup else model  # the output layer keeps what is not adapted


class ModelExport:
    """The HF folder of a checkpoint while it is written, merged where there is an adapter.

    Made, checked and finished by all ranks at the same step; each writes its tensors by itself, in any thread where
    they were gathered before.
    """

    def __init__(
        self,
        chunks: Sequence[CausalLM],
        model: ModelConfig,
        checkpoint: Path,
        export: Export,
        place: torch.device,
        copies: Sequence[Mapping[str, Tensor | None]] | None = None,
    ) -> None:
        """Lay the files out; collective.

        Args:
            chunks: this rank's model chunks.
            model: their description; `dtype` is what config.json will say.
            checkpoint: the folder that is being written; it exists on every rank.
            place: this rank's device.
            copies: for each chunk its tensors by local name, copied to the CPU. With them whole tensors are brought
                together now, and `write` neither talks to other ranks nor looks at the live model. None: one after the
                other while they are written.
        """
        self.export, self.place = export, place
        self.model = exported_model(model, export.settings)
        shares = LiveShares(chunks, self.model, copies)
        self.folder, self.first = checkpoint / MODEL_FOLDER, torch.distributed.get_rank() == 0
        if self.first:
            self.folder.mkdir()
            self.files = HfFiles(self.folder, shares, export.shard_bytes)
        sum_over_ranks(0, place)  # the files are laid out before others open them
        if not self.first:
            self.files = HfFiles(self.folder, shares, export.shard_bytes, create=False)
        self.wanted, self.written = sum(len(one.hf) for one in shares.table.entries.values()), 0
        self.tensors = shares.own(export.settings)
        if copies is not None:
            self.tensors = released(deque(self.tensors))

    def write(self) -> None:
        """Write this rank's tensors; collective unless they were brought together before."""
        for name, source in self.tensors:
            self.written += self.files.write(source, name)
        self.files.close(whole=False)

    def check(self) -> None:
        """Count what all ranks have written; collective.

        Raises:
            InputError: some tensor of the model was written by no rank, or by several.
        """
        written = sum_over_ranks(self.written, self.place)
        if written != self.wanted:
            raise InputError(f"{self.folder}: {written} tensors were written, the model has {self.wanted}")

    def finish(self) -> None:
        """Add what else belongs into the folder; one process does it, once all is checked."""
        self.files.write_index()
        copy_companions(self.export.origin, self.folder, self.model)


def released(found: deque[T]) -> Iterator[T]:
    """Take one after the other out, so that each can be freed when the next one is asked for."""
    while found:
        yield found.popleft()


def sum_over_ranks(value: int, place: torch.device) -> int:
    """The sum of all ranks' values, on every rank; it also waits for all of them."""
    total = torch.tensor([value], device=place)
    torch.distributed.all_reduce(total)
    return int(total.item())


class LiveShares:
    """This rank's shares of the model, by logical name.

    Attributes:
        table: the whole model's.
        shares: base tensors and LoRA factors of all chunks; a tied output layer is left to the embedding, unless
            `model` unties the two.
        copies: of the same tensors on the CPU, where there are any; they stay as they are while training goes on.
    """

    def __init__(
        self,
        chunks: Sequence[CausalLM],
        model: ModelConfig,
        copies: Sequence[Mapping[str, Tensor | None]] | None = None,
    ) -> None:
        """Collect them; collective, as tensors of a type of their own have to be known to all ranks."""
        self.table = WeightTable(model)
        self.first_expert = parallel.expert_place(model.num_experts)[0]
        self.shares: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        for chunk, copied in zip(chunks, copies or [None] * len(chunks), strict=True):
            for local, tensor in live_tensors(chunk).items():
                name = logical_name(local, chunk.first_layer, first_expert=self.first_expert)
                if is_lora(name) or self.table.resolve(name) == name:
                    self.shares[name] = tensor.detach()
                    if copied is not None:
                        self.copies[name] = copied[local]
            if chunk.post_process and not model.tie_word_embeddings and OUTPUT_LAYER not in self.shares:
                self.shares[OUTPUT_LAYER] = chunk.head_weight.detach()  # the embedding's, which is frozen
        self.common = getattr(torch, model.dtype)
        own = {name: tensor.dtype for name, tensor in self.shares.items() if tensor.dtype != self.common}
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own)
        self.others = {name: dtype for one in found for name, dtype in one.items()}
        self.turns = {False: 0, True: 0}

    def names(self) -> list[str]:
        """Logical names of the base tensors this rank has a share of, alike on all ranks of their group."""
        return [name for name in self.shares if not is_lora(name)]

    def dtype(self, name: str) -> torch.dtype:
        """Type of any tensor of the model."""
        return self.others.get(name, self.common)

    def own(self, settings: LoraSettings | None) -> Iterator[tuple[str, TensorSource]]:
        """The tensors this rank is to write, by name, brought together one after the other; collective."""
        for name in self.names():
            source = self.bring_together(name, settings)
            if source is not None:
                yield name, source

    def bring_together(self, name: str, settings: LoraSettings | None) -> TensorSource | None:
        """A source of one tensor, merged with its adapter, on the rank whose turn it is; None on the others.

        Collective over the tensor's group. Among replicas of the group, one takes part.
        """
        of_expert = expert_number(name) is not None
        group, replica, replicas = group_and_replica(of_expert)
        turn = self.turns[of_expert]
        self.turns[of_expert] += 1
        if turn % replicas != replica:
            return None
        writer = turn // replicas % group.size()
        module = name.removesuffix(".weight")
        factors = [f"{module}.{factor}.weight" for factor in FACTORS if f"{module}.{factor}.weight" in self.shares]
        found = {one: self.whole(one, group, writer) for one in (name, *factors)}
        if group.rank() != writer:
            return None
        base = AdapterTensors(Path(name), self.table, {name: found.pop(name)})
        if not factors:
            return base
        lora = AdapterTensors(Path(name), self.table, found)
        return MergedSource(base, show_stored(LoraSource(lora, settings, None, None, None)))

    def whole(self, name: str, group: ProcessGroup, writer: int) -> Assembled | None:
        """A tensor made of all shares in `group` on its rank `writer`, None on the others; collective."""
        share = self.shares[name]
        axis = live_axis(self.table, name, share, group.size())
        own = [self.copies[name] if name in self.copies else share.cpu()] if group.rank() == writer else []
        parts = own if axis.dim is None else gather(share, own, group, writer)  # without a dimension every rank has it
        if not parts:
            return None
        rank = lora_rank(name, share.shape) if is_lora(name) else None
        shape = self.table.shape(name, rank)
        return Assembled(tuple(InMemory(part) for part in parts), axis, shape, share.dtype)


def group_and_replica(of_expert: bool) -> tuple[ProcessGroup, int, int]:
    """(the ranks that share a tensor, which of the replicas of that group this one is, how many there are)."""
    if of_expert:
        return (
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_data_parallel_world_size(),
        )
    return (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )


def gather(share: Tensor, own: Sequence[Tensor], group: ProcessGroup, writer: int) -> list[Tensor]:
    """All shares, by rank, on the CPU of the group's rank `writer`; none on the others. Shares are alike in shape.

    Args:
        own: the writer's share on the CPU.
    """
    ranks = torch.distributed.get_process_group_ranks(group)
    if group.rank() != writer:
        torch.distributed.send(share.contiguous(), ranks[writer], group=group)
        return []
    found = []
    for number, rank in enumerate(ranks):
        if number == writer:
            found += own
            continue
        received = torch.empty_like(share)
        torch.distributed.recv(received, rank, group=group)
        found.append(received.cpu())
    return found
