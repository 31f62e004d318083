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

import torch

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.checkpoint.convert_job import Job
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint, ShardedSource
from mindspeed_llm.checkpoint.open import open_lora
from mindspeed_llm.checkpoint.sizes import human, parse_size
from mindspeed_llm.checkpoint.targets import HfFolder, PeftFolder
from mindspeed_llm.checkpoint.verify.copies import wrong_copies
from mindspeed_llm.checkpoint.verify.exact import Adapter, ExactSource
from mindspeed_llm.checkpoint.verify.networks import Network, Setting, agreements, engine, model_bytes
from mindspeed_llm.checkpoint.verify.reference import NoReference
from mindspeed_llm.checkpoint.verify.report import FILE, Verdict
from mindspeed_llm.checkpoint.verify.shares import wrong_shares
from mindspeed_llm.checkpoint.verify.sides import Sides, open_sides, peft_deltas
from mindspeed_llm.checkpoint.verify.text import read_tokens
from mindspeed_llm.checkpoint.verify.trace import Agreement
from mindspeed_llm.checkpoint.verify.view import HfDeltas, LogicalDeltas
from mindspeed_llm.checkpoint.verify.weights import compare_deltas, compare_weights, prediction_tensors
from mindspeed_llm.device.cpu import memory
from mindspeed_llm.errors import InputError


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
    folder = job.final if isinstance(job.target, HfFolder | PeftFolder) else job.final.parent
    verdict.write(folder / FILE)
    print("\n".join(verdict.lines()))
    return verdict


def compare_sides(verdict: Verdict, sides: Sides, job: Job, options: ConvertOptions) -> None:
    """Make every check."""
    limit = parse_size(options.max_memory, "--max-memory")
    config = sides.base.config
    folders = (sides.truth, job.origin, sides.folder)
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
    if sides.missing:
        verdict.skip("peft", sides.missing)
    if job.adapter_only:
        with engine():
            check_adapters(verdict, sides, setting, job, options)
        return
    check_weights(verdict, sides, options)
    check_copies(verdict, sides)
    with engine():
        check_logits(verdict, sides, setting)
        check_sum(verdict, sides, setting)


def check_weights(verdict: Verdict, sides: Sides, options: ConvertOptions) -> None:
    """The table of tensors, and the scan for values that are no numbers."""
    wanted, found = sides.summed(sides.dtype), sides.result_tensors()
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
    """What rank files hold more than once, and which share of a tensor each of them holds."""
    if sides.checkpoint is not None:
        looked, verdict.copies = wrong_copies(sides.checkpoint)
        detail = f"{looked} replicas, tied heads and padded shares agree with their originals"
        if verdict.copies:
            worst = verdict.copies[0]
            detail = f"{len(verdict.copies)} of {looked} are wrong: {worst.name} in {worst.where} is {worst.problem}"
        verdict.add("copies", not verdict.copies, detail)
    for side, checkpoint in (("source", source_checkpoint(sides.base)), ("result", sides.checkpoint)):
        if checkpoint is None or checkpoint.layout.tp == checkpoint.layout.etp == 1:
            continue
        looked, wrong = wrong_shares(checkpoint)
        detail = f"{looked} of the {side}'s rank files are what megatron-core's modules hold"
        if wrong:
            verdict.copies = verdict.copies + wrong
            detail = f"{len(wrong)} of {looked} of the {side} are wrong: {wrong[0].name} in {wrong[0].where}"
        verdict.add("shares", not wrong, detail)


def source_checkpoint(base: TensorSource) -> MegatronCheckpoint | None:
    """The source's rank files; None for other formats."""
    return MegatronCheckpoint(base.path, config=base.config) if isinstance(base, ShardedSource) else None


def check_logits(verdict: Verdict, sides: Sides, setting: Setting) -> None:
    """The networks of both sides over the text."""
    wanted, found = sides.summed(sides.dtype), sides.result_tensors()
    wanted.prefer(found)
    live_result = setting.live("live network of the result", sides.result)
    if sides.truth is not None:
        source = setting.transformers("transformers on the source", sides.truth, wanted, sides.unties)
    else:
        if sides.adapter is not None and not sides.adapter.plain:
            verdict.skip("logits", f"{sides.why_not}: only peft computes this adapter")
            return
        exact = ExactSource(sides.base, sides.adapter, sides.dtype, sides.result)
        source = setting.live("live network of the source", exact)
    if not sides.to_hf:
        judge(verdict, "logits", source, live_result)
        if sides.truth is None:
            verdict.skip("transformers", f"{sides.why_not}: the source itself was not held against transformers")
        return
    result = setting.transformers("transformers on the result", sides.folder, found)
    judge(verdict, "logits", result, source if sides.truth is None else live_result)
    if sides.truth is not None:
        judge(verdict, "source", source, result)


def check_sum(verdict: Verdict, sides: Sides, setting: Setting) -> None:
    """The exact sum against the adapter running beside its base: is it scaled and placed as in training?"""
    if sides.adapter is None or not sides.adapter.plain or not sides.adapter.inside_layers:
        return
    beside = setting.live("live network with the adapter beside", sides.base, sides.adapter)
    if sides.truth is None:
        merged = setting.live("live network of the exact sum", ExactSource(sides.base, sides.adapter, torch.float64))
    else:
        merged = setting.transformers("transformers on the exact sum", sides.truth, sides.summed(torch.float64))
    judge(verdict, "adapter", merged, beside)


def check_adapters(verdict: Verdict, sides: Sides, setting: Setting, job: Job, options: ConvertOptions) -> None:
    """An adapter converted alone: delta by delta, and the networks with it."""
    to_peft = isinstance(job.target, PeftFolder)
    ours: Adapter | None = None
    try:
        written = open_lora(job.final, base=job.base)
        if to_peft:
            result: HfDeltas = peft_deltas(sides, job.final)
        else:
            ours = Adapter([(written, 1.0)])
            result = LogicalDeltas(ours)
    except NoReference as error:
        verdict.skip("peft", str(error))
        result = LogicalDeltas(Adapter([(written, 1.0)]))
    except InputError as error:
        verdict.add("files", False, str(error))
        return
    verdict.rows = compare_deltas(sides.base_tensors(), sides.deltas, result, options.params_dtype)
    wrong = [row for row in verdict.rows if not row.passed]
    detail = f"{len(wrong)} of {len(verdict.rows)} differ" if wrong else f"{len(verdict.rows)} tensors get the same"
    verdict.add("deltas", not wrong and bool(verdict.rows), detail)
    if sides.truth is None:
        verdict.skip("logits", f"{sides.why_not}: the adapter was not held against transformers")
        return
    of_source = setting.transformers(
        "transformers with the source's adapter", sides.truth, sides.summed(torch.float64), sides.unties
    )
    of_result = setting.transformers(
        "transformers with the result's adapter", sides.truth, sides.summed(torch.float64, [result]), sides.unties
    )
    if ours is not None:
        of_result = setting.live("live network with the result's adapter beside", sides.base, ours)
    elif sides.adapter.plain and sides.adapter.inside_layers:
        judge(verdict, "adapter", of_source, setting.live("live network beside", sides.base, sides.adapter))
    judge(verdict, "logits", of_source, of_result)


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
