"""Which share of each tensor a tensor-parallel rank must hold, by megatron-core's modules and not by our weight tables.

A wrong kind in a table would cancel: a model written in wrong shares and read back by the same kind is whole again. So
every share in a rank file is held against the rule of the module it belongs to:

    ColumnParallelLinear   a block of rows              (of gated fc1: a block of gate above the same block of up)
    RowParallelLinear      a block of columns; its bias whole
    VocabParallelEmbedding a block of rows of the padded table
    anything else          whole
"""

import re

import torch

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint, ShardedSource
from mindspeed_llm.checkpoint.formats.mcore_names import FileNames
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, is_lora
from mindspeed_llm.checkpoint.verify.copies import Copy

COLUMN = re.compile(
    r"(\.self_attention\.(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(weight|bias)"
    r"|\.self_attention\.core_attention\.softmax_offset)$"
)
GATED = re.compile(r"\.linear_fc1\.(weight|bias)$")
ROW = re.compile(r"\.(linear_proj|linear_fc2)\.weight$")

Box = tuple[Ranges | None, Ranges | None]


def share_of(name: str, shape: tuple[int, ...], share: tuple[int, ...], rank: int, size: int) -> Box:
    """(rows, columns) of the logical tensor that a rank must hold; padding rows of a vocabulary are not in it.

    Args:
        shape, share: of the logical tensor, and of what the rank holds.
    """
    if size == 1:
        return None, None
    if name in (EMBEDDING, OUTPUT_LAYER):
        start = rank * share[0]
        return [(min(start, shape[0]), min(start + share[0], shape[0]))], None
    if GATED.search(name):
        half = shape[0] // 2
        width = half // size
        return [(part * half + rank * width, part * half + (rank + 1) * width) for part in (0, 1)], None
    if COLUMN.search(name):
        width = shape[0] // size
        return [(rank * width, (rank + 1) * width)], None
    if ROW.search(name):
        width = shape[1] // size
        return None, [(rank * width, (rank + 1) * width)]
    return None, None


def wrong_shares(checkpoint: MegatronCheckpoint) -> tuple[int, list[Copy]]:
    """(shares looked at, those that are not what megatron-core's modules hold)."""
    looked, wrong = 0, []
    layout, source = checkpoint.layout, ShardedSource(checkpoint, checkpoint.tensors)
    if layout.tp == layout.etp == 1:
        return looked, wrong
    for rank in layout.ranks():
        where = f"{layout.rank_folder(*rank)}/{CHECKPOINT_FILE}"
        for vp_rank, key in enumerate(layout.model_keys()):
            names = FileNames(checkpoint.table, layout, rank, vp_rank)
            for name, tensor, whole in checkpoint.local_tensors((), key, rank, names):
                if whole or is_lora(name) or name.startswith("mtp."):
                    continue
                of_expert = checkpoint.table.entry(name).expert is not None
                place = (names.experts.part, layout.etp) if of_expert else (rank.tp, layout.tp)
                looked += 1
                if not holds(tensor, source, name, *place):
                    wrong.append(Copy(name, where, "not the share that tensor parallelism gives this rank"))
    return looked, wrong


def holds(tensor: LazyTensor, source: ShardedSource, name: str, rank: int, size: int) -> bool:
    """Whether a stored share has the values the rule gives it."""
    rows, columns = share_of(name, source.shape(name), tensor.shape, rank, size)
    wanted, found = source.read(name, rows, columns), tensor.read()
    if name in (EMBEDDING, OUTPUT_LAYER):
        found = found[: wanted.shape[0]]
    return found.shape == wanted.shape and torch.equal(found, wanted)
