"""What pool processes run to compute a case in float64: what then still differs is a mistake, not rounding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state as groups

from mindspeed_llm.models import gpt
from mindspeed_llm.training.engine import run_microbatches
from mindspeed_llm.training.optimizer_state import export_gradients
from tests.distributed.cases import Arrays, Case
from tests.distributed.double import InDouble
from tests.distributed.worker import arrays, live, logical, share
from tests.distributed.worker_result import Result


def gradients(rank: int, case: Case, folder: Path, adapter: Arrays, step: Sequence[Any]) -> Result:
    """Every gradient of one global batch; megatron-core's buffers, which hold them in the end, are float32."""
    with mock.patch.dict(gpt.DTYPES, {case.dtype: torch.float64}), live(case, folder, adapter) as engine:
        for chunk in engine.wrapped:
            chunk.zero_grad_buffer()
        with InDouble():
            run_microbatches(engine, share(step), forward_only=False)
        found = arrays(export_gradients(engine.optimizer, logical(engine, trainable=True)))
        return Result(
            groups.get_tensor_model_parallel_rank(),
            groups.get_pipeline_model_parallel_rank(),
            groups.get_data_parallel_rank(),
            groups.get_context_parallel_rank(),
            groups.get_expert_tensor_parallel_rank(),
            gradients=found,
        )
