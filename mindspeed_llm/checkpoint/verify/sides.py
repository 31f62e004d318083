"""The two sides of a conversion, opened as anybody would open them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.convert_job import DTYPES, Job
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.open import open_base, open_lora
from mindspeed_llm.checkpoint.targets import HfFolder, PeftFolder, RankFiles
from mindspeed_llm.checkpoint.verify.exact import Adapter
from mindspeed_llm.checkpoint.verify.hub import HubTensors, has_weights
from mindspeed_llm.checkpoint.verify.peft_side import PeftDeltas, is_peft_folder
from mindspeed_llm.checkpoint.verify.reference import EMBEDDING, HEAD, NOT_WEIGHTS, NoReference
from mindspeed_llm.checkpoint.verify.view import HfDeltas, HfTensors, HfView, LogicalDeltas, Wanted
from mindspeed_llm.errors import InputError

DIFFERENT_MODEL = "the HF folder it records holds other weights"
NO_HF_FOLDER = "no HF folder with the source's weights"


@dataclass
class Sides:
    """The opened sides of one conversion.

    Attributes:
        base: the source as it lies in its folder.
        dtype: that was asked for; None keeps each tensor's own.
        truth: the HF folder that holds the source's weights; None when there is none, and `why_not` says so.
        adapter: what was merged in or converted, as factors by logical name; None without one.
        deltas: the same as transformers' and peft's world has it, by HF name.
        unties: the adapter gives a tied model a head of its own.
        missing: why a PEFT adapter was not computed by peft; empty when it was, or when there is none.
        result: what was written, by logical name; None for an adapter alone.
        folder: where it lies.
        to_hf: the result is an HF folder.
        checkpoint: the result's rank files, where it is a model made of such.
    """

    base: TensorSource
    dtype: torch.dtype | None
    truth: Path | None
    why_not: str
    folder: Path
    to_hf: bool
    adapter: Adapter | None = None
    deltas: list[HfDeltas] = field(default_factory=list)
    unties: bool = False
    missing: str = ""
    result: TensorSource | None = None
    checkpoint: MegatronCheckpoint | None = None

    def result_tensors(self) -> HfTensors:
        """The result under HF names."""
        return without_copies(HubTensors(self.folder)) if self.to_hf else HfView(self.result)

    def base_tensors(self) -> HfTensors:
        """The source under HF names, from its HF folder where there is one."""
        return HfView(self.base) if self.truth is None else without_copies(HubTensors(self.truth))

    def summed(self, dtype: torch.dtype | None, deltas: list[HfDeltas] | None = None) -> Wanted:
        """The source's HF tensors with the adapters merged in (or other `deltas`), in a type."""
        head = (HEAD, EMBEDDING) if self.unties else None
        return Wanted(self.base_tensors(), self.base.table, self.deltas if deltas is None else deltas, dtype, head)


def open_sides(job: Job, options: ConvertOptions) -> Sides:
    """Open both sides; `InputError` when the result cannot be opened."""
    dtype = DTYPES[options.params_dtype] if options.params_dtype else None
    to_hf = isinstance(job.target, HfFolder)
    with_peft = isinstance(job.target, PeftFolder) or any(map(is_peft_folder, options.lora_load or ()))
    truth, why_not = truth_folder(job, wanted=not to_hf or with_peft)
    sides = Sides(job.base, dtype, truth, why_not, job.final, to_hf)
    if job.lora is not None:
        add_adapters(sides, job.lora, options)
    if job.adapter_only:
        return sides
    if isinstance(job.target, RankFiles):
        sides.checkpoint = MegatronCheckpoint(job.final)
        sides.result = sides.checkpoint.base()
    else:
        sides.result = open_base(job.final)
    return sides


def add_adapters(sides: Sides, lora: LoraSource, options: ConvertOptions) -> None:
    """Open each adapter for itself: PEFT folders by peft, Megatron checkpoints by their own settings."""
    paths = options.lora_load or []
    weights = options.lora_weights or [1.0] * len(paths)
    sides.adapter, sides.unties = Adapter([(lora, 1.0)]), lora.unties
    try:
        for path, weight in zip(paths, weights, strict=True):
            if is_peft_folder(path):
                sides.deltas.append(peft_deltas(sides, Path(path), weight))
            else:
                alone = open_lora(path, alpha=options.lora_alpha, family_name=options.model_type_hf)
                sides.deltas.append(LogicalDeltas(Adapter([(alone, weight)])))
    except NoReference as error:
        sides.missing, sides.deltas = str(error), []
    if not sides.deltas:  # an adapter inside the source, or a PEFT folder that peft cannot compute
        sides.deltas = [LogicalDeltas(sides.adapter)]
    if not any(map(is_peft_folder, paths)) and paths:
        opened = [open_lora(path, alpha=options.lora_alpha, family_name=options.model_type_hf) for path in paths]
        sides.adapter = Adapter(list(zip(opened, weights, strict=True)))


def peft_deltas(sides: Sides, adapter: Path, weight: float = 1.0) -> PeftDeltas:
    """A PEFT folder as peft merges it into the source's HF folder; `NoReference` when there is no such folder."""
    if sides.truth is None:
        raise NoReference(f"{sides.why_not}, which peft needs to merge {adapter}")
    return PeftDeltas(sides.truth, without_copies(HubTensors(sides.truth)), adapter, weight)


def truth_folder(job: Job, wanted: bool) -> tuple[Path | None, str]:
    """(the HF folder that holds the source's own weights, why there is none).

    Args:
        wanted: an HF folder the source was once made from is of use.
    """
    if isinstance(job.base, HFSource):
        return job.base.path, ""
    if not wanted or not has_weights(job.origin):
        return None, NO_HF_FOLDER
    metadata = job.base.metadata
    own = (metadata.content_hash if metadata else None) or content_hash(job.base)
    try:
        same = content_hash(HFSource(job.origin)) == own
    except InputError as error:
        return None, str(error)
    return (job.origin, "") if same else (None, DIFFERENT_MODEL)


def without_copies(tensors: HubTensors) -> HubTensors:
    """An HF folder's tensors without those that follow from others: stored tied heads, frequencies of positions."""
    tied = tensors.config.get("tie_word_embeddings")
    for name in tensors.names():
        if name.endswith(NOT_WEIGHTS) or (tied and name == HEAD):
            del tensors.stored[name]
    return tensors
