"""What pool processes run to see where bytes come from and go to: load a model, export it. Imports megatron-core."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.checkpoint.formats import lazy
from mindspeed_llm.checkpoint.formats.hf import HfFiles
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.open import BaseSource, open_base
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.training import export
from tests.training.faults import replaced

PAGE = 4096


@contextmanager
def empty_model(folder: Path, layout: dict[str, Any]) -> Iterator[tuple[BaseSource, list[CausalLM]]]:
    """The opened base, and this rank's chunks without values; layout: fields of `EngineOptions`."""
    engine, chosen, base = gpt.EngineOptions(**layout), device.select("cpu"), open_base(folder)
    virtual = engine.virtual_stages(base.config.num_layers)
    experts = {"expert": engine.expert, "expert_tensor": engine.expert_tensor}
    parallel.start(chosen, engine.tensor, engine.pipeline, virtual, **experts)
    try:
        yield base, gpt.build_chunks(base.config, engine, chosen)
    finally:
        parallel.stop()


def fill(base: BaseSource, chunks: Sequence[CausalLM]) -> int:
    """Load this rank's shares; -> their bytes in the type of the files."""
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    experts = ExpertShare(*parallel.expert_place(base.config.num_experts))
    return sum(
        load_live(live_tensors(chunk), base, rank, size, chunk.first_layer, experts=experts).nbytes for chunk in chunks
    )


def exported(rank: int, folder: Path, target: Path, **layout: Any) -> tuple[list[str], int]:
    """Export a loaded model; -> (the tensors this rank wrote, the most bytes of tensors it held at once)."""
    wrote: list[str] = []
    held: list[int] = []

    def noting(write: Any) -> Any:
        def noted(files: HfFiles, source: Any, name: str) -> int:
            wrote.append(name)
            held.append(sum(part.tensor.nbytes for one in source.tensors.values() for part in one.parts))
            return write(files, source, name)

        return noted

    with empty_model(folder, layout) as (base, chunks), replaced(HfFiles, "write", noting):
        fill(base, chunks)
        dtype = str(layout.get("dtype", torch.float32)).removeprefix("torch.")
        plan = export.Export(20_000, True, False, folder, str(folder), None)
        model = dataclasses.replace(base.config, dtype=dtype)
        files = export.ModelExport(chunks, model, target, plan, torch.device("cpu"))
        files.write()
        files.check()
        if rank == 0:
            files.finish()
    return wrote, max(held)


def read_bytes(rank: int, folder: Path, **layout: Any) -> dict[str, int]:
    """What this rank takes from the files while it loads a model.

    -> "own" (bytes of its parameters), "copied" (bytes read into memory, or copied out of a mapping), "touched" (bytes
    of pages it needs for the latter), "mapped" (the bytes copied out of mappings).
    """
    found = dict.fromkeys(("own", "copied", "touched", "mapped"), 0)

    def counting_reads(read_into: Any) -> Any:
        def counted(path: Path, descriptor: int, offset: int, memory: memoryview) -> None:
            found["copied"] += len(memory)
            read_into(path, descriptor, offset, memory)

        return counted

    def counting_boxes(narrow_array: Any) -> Any:
        def counted(values: numpy.ndarray, *box: Any) -> numpy.ndarray:
            taken = narrow_array(values, *box)
            found["copied"] += taken.nbytes
            found["mapped"] += taken.nbytes
            places = numpy.arange(values.size).reshape(values.shape) * values.itemsize
            start = values.__array_interface__["data"][0] % PAGE
            found["touched"] += PAGE * len(numpy.unique((narrow_array(places, *box) + start) // PAGE))
            return taken

        return counted

    with (
        empty_model(folder, layout) as (base, chunks),
        replaced(lazy, "read_into", counting_reads),
        replaced(lazy, "narrow_array", counting_boxes),
    ):
        found["own"] = fill(base, chunks)
    return found


def read_while_opened(rank: int, argv: list[str]) -> int:
    """Bytes this rank reads while an inference.py command line opens base and adapter and checks that they belong."""
    from mindspeed_llm.arguments.parser import parse
    from mindspeed_llm.arguments.programs import InferenceOptions
    from mindspeed_llm.inference.live import open_sources

    found = [0]

    def counting(read_into: Any) -> Any:
        def counted(path: Path, descriptor: int, offset: int, memory: memoryview) -> None:
            found[0] += len(memory)
            read_into(path, descriptor, offset, memory)

        return counted

    with replaced(lazy, "read_into", counting):
        open_sources(parse(InferenceOptions, argv, "inference.py"))
    return found[0]
