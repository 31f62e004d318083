"""What pool processes run to train with an option at a layout. Imports megatron-core."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as groups

from mindspeed_llm import device
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.lora.config import settings_from_options
from mindspeed_llm.lora.inject import inject
from mindspeed_llm.lora.sources import load_adapter
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.training.engine import create_engine
from tests.distributed.cases import Arrays, Case
from tests.distributed.worker import OPTIONS, Factors, arrays, engine_options, logical, measure, start
from tests.distributed.worker_result import Result
from tests.lora.faults import FAULTS
from tests.lora.options_reference import Option


def trained(
    rank: int, case: Case, folder: Path, option: Option, adapter: Arrays, steps: Sequence[Any]
) -> tuple[Result, Arrays]:
    """Train two steps with an option; -> the report, and the adapter's tensors before them by logical name."""
    start(case)
    try:
        base = open_base(folder)
        settings = settings_from_options(option.options(), base.table)
        chunks = gpt.build_chunks(base.config, engine_options(case), device.select("cpu"))
        tp, experts = (
            groups.get_tensor_model_parallel_rank(),
            ExpertShare(*parallel.expert_place(base.config.num_experts)),
        )
        for chunk in chunks:
            load_live(live_tensors(chunk), base, tp, case.tensor, chunk.first_layer, experts=experts)
        with FAULTS[case.fault]():
            inject(chunks, settings, case.fused, 1, case.fused_mlp, fresh=option.fresh)
            source = LoraSource(Factors(base.config, adapter), settings, None, None, None)
            for chunk in chunks if not option.fresh else ():
                load_adapter(chunk, source, tp, case.tensor, experts)
            engine = create_engine(chunks, OPTIONS, loraplus_lr_ratio=option.ratio)
            before = arrays(logical(engine, trainable=True))
            result = measure(engine, steps)
        for chunk in engine.wrapped:
            chunk.grad_accs.clear()
        return result, before
    finally:
        parallel.stop()
