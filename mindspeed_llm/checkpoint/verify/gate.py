"""`--test-convert-precision true`: is the result the model that the source is?

The truth is what transformers computes from HF files. The weights of both sides are held against each other tensor by
tensor under HF names, and, because a wrong row of a weight table would cancel there, the logits of transformers'
network against those of our live one, which knows megatron-core's names and no HF name:

    hf -> mg    transformers(source)                        live(result)
    mg -> hf    transformers(result)                        live(source)
    mg -> mg    transformers(the HF folder it came from)    live(result), or live(source) where there is no such folder
    hf -> hf    transformers(source), live(result)          transformers(result)

With an adapter the source is the exact sum (`exact.py`), which in turn is held against the unmerged adapter running
beside its base.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.checkpoint.convert_job import DTYPES, Job
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.checkpoint.sizes import human, parse_size
from mindspeed_llm.checkpoint.targets import HfFolder, RankFiles
from mindspeed_llm.checkpoint.verify.copies import wrong_copies
from mindspeed_llm.checkpoint.verify.exact import Adapter, ExactSource
from mindspeed_llm.checkpoint.verify.hub import HubTensors, has_weights
from mindspeed_llm.checkpoint.verify.networks import Network, Setting, agreements, engine, model_bytes
from mindspeed_llm.checkpoint.verify.reference import HEAD, NOT_WEIGHTS, NoReference
from mindspeed_llm.checkpoint.verify.report import FILE, Verdict
from mindspeed_llm.checkpoint.verify.text import read_tokens
from mindspeed_llm.checkpoint.verify.trace import Agreement
from mindspeed_llm.checkpoint.verify.view import HfTensors, HfView, Wanted
from mindspeed_llm.checkpoint.verify.weights import compare_weights, prediction_tensors
from mindspeed_llm.device.cpu import memory
from mindspeed_llm.errors import InputError

DIFFERENT_MODEL = "the HF folder it records holds other weights"
NO_HF_FOLDER = "no HF folder with the source's weights"


@dataclass
class Sides:
    """The opened sides of one conversion.

    Attributes:
        base: the source as it lies in its folder.
        adapter: what was merged in.
        dtype: that was asked for; None keeps each tensor's own.
        truth: the HF folder that holds the source's weights; None when there is none, and `why_not` says so.
        result: what was written, by logical name.
        result_folder: where it lies.
        to_hf: the result is an HF folder.
        checkpoint: the result's rank files, where it is made of such.
    """

    base: TensorSource
    adapter: Adapter | None
    dtype: torch.dtype | None
    truth: Path | None
    why_not: str
    result: TensorSource
    result_folder: Path
    to_hf: bool
    checkpoint: MegatronCheckpoint | None

    def result_tensors(self) -> HfTensors:
        """The result under HF names."""
        return HubTensors(self.result_folder) if self.to_hf else HfView(self.result)

    def wanted(self) -> Wanted:
        """The HF tensors the result has to have."""
        return self.summed(self.dtype)

    def summed(self, dtype: torch.dtype | None) -> Wanted:
        """The source's HF tensors with the adapter merged in, in a type."""
        tensors: HfTensors = HfView(self.base) if self.truth is None else without_copies(HubTensors(self.truth))
        return Wanted(tensors, self.base.table, self.adapter, dtype)


def run_gate(job: Job, options: ConvertOptions) -> Verdict:
    """Compare a conversion's result with its source, print the verdict and write `precision_report.json`.

    Args:
        job: the conversion that has been published.
        options: its command line; `max_memory` limits what is compared whole.
    """
    started = time.monotonic()
    verdict = Verdict()
    try:
        sides = open_sides(job, options)
    except InputError as error:
        verdict.add("files", False, str(error))
    else:
        compare_sides(verdict, sides, job, options)
    verdict.seconds = time.monotonic() - started
    verdict.peak_bytes = memory()[1]
    folder = job.final if isinstance(job.target, HfFolder) else job.final.parent
    verdict.write(folder / FILE)
    print("\n".join(verdict.lines()))
    return verdict


def open_sides(job: Job, options: ConvertOptions) -> Sides:
    """Open the result as anybody would; `InputError` when it cannot be."""
    dtype = DTYPES[options.params_dtype] if options.params_dtype else None
    adapter = Adapter(job.lora) if job.lora else None
    checkpoint = MegatronCheckpoint(job.final) if isinstance(job.target, RankFiles) else None
    result = open_base(job.final) if checkpoint is None else checkpoint.base()
    to_hf = isinstance(job.target, HfFolder)
    truth, why_not = truth_folder(job, to_hf)
    return Sides(job.base, adapter, dtype, truth, why_not, result, job.final, to_hf, checkpoint)


def truth_folder(job: Job, to_hf: bool) -> tuple[Path | None, str]:
    """(the HF folder that holds the source's own weights, why there is none)."""
    if isinstance(job.base, HFSource):
        return job.base.path, ""
    if to_hf or not has_weights(job.origin):
        return None, NO_HF_FOLDER
    metadata = job.base.metadata
    own = (metadata.content_hash if metadata else None) or content_hash(job.base)
    try:
        same = content_hash(HFSource(job.origin)) == own
    except InputError as error:
        return None, str(error)
    if not same:
        return None, DIFFERENT_MODEL
    return job.origin, ""


def without_copies(tensors: HubTensors) -> HubTensors:
    """An HF folder's tensors without those that follow from others: stored tied heads, frequencies of positions."""
    tied = tensors.config.get("tie_word_embeddings")
    for name in tensors.names():
        if name.endswith(NOT_WEIGHTS) or (tied and name == HEAD):
            del tensors.stored[name]
    return tensors


def compare_sides(verdict: Verdict, sides: Sides, job: Job, options: ConvertOptions) -> None:
    """Make every check."""
    limit = parse_size(options.max_memory, "--max-memory")
    config = sides.base.config
    folders = (sides.truth, job.origin, sides.result_folder)
    tokens = read_tokens(folders, config.vocab_size, config.max_position_embeddings)
    setting = Setting(tokens.ids, limit, model_bytes(sides.base))
    how = "layer by layer" if setting.streamed() else "whole"
    verdict.facts = {
        "source": str(options.load_dir),
        "adapter": options.lora_load,
        "result": str(job.final),
        "hf_folder": None if sides.truth is None else str(sides.truth),
        "text": tokens.origin,
        "tokens": tokens.ids.size(1),
        "networks": how,
        "model_bytes_float32": setting.model_bytes,
        "max_memory": limit,
    }
    print(
        f"precision: {tokens.ids.size(1)} tokens ({tokens.origin}), networks {how}"
        f" ({human(setting.model_bytes)} in float32, --max-memory {human(limit)})",
        flush=True,
    )
    check_weights(verdict, sides, options)
    check_copies(verdict, sides)
    with engine():
        check_logits(verdict, sides, setting)
        check_adapter(verdict, sides, setting)


def check_weights(verdict: Verdict, sides: Sides, options: ConvertOptions) -> None:
    """The table of tensors, and the scan for values that are no numbers."""
    wanted, found = sides.wanted(), sides.result_tensors()
    if isinstance(found, HubTensors):
        found = without_copies(found)
    wanted.prefer(found)
    left_out: set[str] = set()
    if options.mtp_num_layers == 0:
        left_out |= prediction_tensors(wanted.names(), sides.base.config.num_layers)
    if options.ignore_unknown:
        left_out |= set(wanted.names()) - set(sides.base.table.hf_names)
    verdict.rows = compare_weights(wanted, found, left_out)
    wrong = [row for row in verdict.rows if not row.passed]
    rounded = sum(row.rounded for row in verdict.rows)
    elements = sum(row.elements for row in verdict.rows)
    detail = f"{len(verdict.rows)} tensors, {elements} elements equal bit for bit"
    if rounded:
        detail = f"{len(verdict.rows)} tensors, {elements} elements right; {rounded} are the other of two right values"
    if wrong:
        worst = max(wrong, key=lambda row: row.badness())
        detail = f"{len(wrong)} of {len(verdict.rows)} tensors are wrong, {worst.name} ({worst.verdict}) most"
    verdict.add("weights", not wrong, detail)
    nonfinite = [row.name for row in verdict.rows if row.nonfinite]
    empty = [row.name for row in verdict.rows if row.note == "all zero" and not row.passed]
    suspicious = nonfinite + empty
    detail = f"NaN or Inf in {len(nonfinite)} tensors, zeros instead of values in {len(empty)}"
    verdict.add("values", not suspicious, f"{detail}, first {suspicious[0]}" if suspicious else detail)


def check_copies(verdict: Verdict, sides: Sides) -> None:
    """What rank files hold more than once."""
    if sides.checkpoint is None:
        return
    looked, verdict.copies = wrong_copies(sides.checkpoint)
    detail = f"{looked} replicas, tied heads and padded shares agree with their originals"
    if verdict.copies:
        worst = verdict.copies[0]
        detail = f"{len(verdict.copies)} of {looked} are wrong: {worst.name} in {worst.where} is {worst.problem}"
    verdict.add("copies", not verdict.copies, detail)


def check_logits(verdict: Verdict, sides: Sides, setting: Setting) -> None:
    """The networks of both sides over the text."""
    wanted, found = sides.wanted(), sides.result_tensors()
    wanted.prefer(found)
    exact = ExactSource(sides.base, sides.adapter, sides.dtype, sides.result)
    live_result = setting.live("live network of the result", sides.result)
    live_source = setting.live("live network of the source", exact)
    if sides.to_hf:
        result = setting.transformers("transformers on the result", sides.result_folder, found)
        judge(verdict, "logits", result, live_source if sides.truth is None else live_result)
        if sides.truth is not None:
            source = setting.transformers("transformers on the source", sides.truth, wanted)
            judge(verdict, "source", source, result)
    elif sides.truth is not None:
        source = setting.transformers("transformers on the source", sides.truth, wanted)
        judge(verdict, "logits", source, live_result)
    else:
        judge(verdict, "logits", live_source, live_result)
        verdict.skip("transformers", f"{sides.why_not}: the source itself was not held against transformers")


def check_adapter(verdict: Verdict, sides: Sides, setting: Setting) -> None:
    """The exact sum against the adapter running beside its base: is it scaled and placed as in training?"""
    if sides.adapter is None:
        return
    beside = setting.live("live network with the adapter beside", sides.base, sides.adapter)
    if sides.truth is None:
        merged = setting.live("live network of the exact sum", ExactSource(sides.base, sides.adapter, torch.float32))
        judge(verdict, "adapter", merged, beside)
        return
    merged = setting.transformers("transformers on the exact sum", sides.truth, sides.summed(torch.float32))
    judge(verdict, "adapter", merged, beside)


def judge(verdict: Verdict, name: str, truth: Network, subject: Network) -> None:
    """Compare two networks and add the check."""
    try:
        found = agreements(truth, subject)
    except NoReference as error:
        verdict.skip(name, str(error))
        return
    except InputError as error:
        verdict.add(name, False, str(error))
        return
    verdict.agreements += found
    verdict.add(name, found[-1].passed, f"{subject.name} against {truth.name}: {'; '.join(map(described, found))}")


def described(one: Agreement) -> str:
    """One comparison of logits in words."""
    text = f"max|d| {one.largest:.2e}, allowed {one.allowed:.2e} in {one.dtype}, top-1 {100 * one.top1:.1f} %"
    if one.layer is not None and one.layer_difference > one.layer_allowed:
        text += f", layer {one.layer} differs by {one.layer_difference:.2e} (allowed {one.layer_allowed:.2e})"
    return text
