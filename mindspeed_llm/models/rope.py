"""Rotary position embeddings: the frequencies transformers uses, and their application.

megatron-core computes plain and a few scaled frequencies, with constants of its own for Llama 3. Here all come from
HF's `rope_scaling`, so that a position turns by the same angle as in transformers.

Shapes: s positions, b batch, n heads, d head dimension, r rotated components of a head, k kinds of layers with
frequencies of their own (one, or full and sliding).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.context import own_positions


def inverse_frequencies(
    base: float, size: int, scaling: Mapping[str, Any] | None = None, length: int = 0, positions: int = 0
) -> tuple[Tensor, float]:
    """Angles per position, fp32 [r/2], and the attention factor: that of cosine and sine.

    Args:
        base: rope theta.
        size: rotated components of a head, r.
        scaling: HF's dictionary; None for plain frequencies.
        length: of the sequence; some scalings depend on it.
        positions: max_position_embeddings, which some scalings compare with.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    if scaling is None:
        return 1.0 / base**exponents, 1.0
    kind, factor = scaling["rope_type"], scaling.get("factor")
    if kind == "linear":
        return 1.0 / base**exponents / factor, 1.0
    if kind == "dynamic":
        stretched = factor * max(length, positions) / positions - (factor - 1)
        return 1.0 / (base * stretched ** (size / (size - 2))) ** exponents, 1.0
    if kind == "llama3":
        return llama3_frequencies(1.0 / base**exponents, scaling), 1.0
    if kind == "yarn":
        return yarn_frequencies(base, size, scaling), yarn_attention_factor(scaling)
    original = scaling["original_max_position_embeddings"]
    divisors = torch.tensor(scaling["long_factor" if length > original else "short_factor"], dtype=torch.float)
    return 1.0 / (divisors * base**exponents), longrope_attention_factor(scaling, positions)


def llama3_frequencies(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended by their wavelength."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)  # within the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / factor + kept * plain


def yarn_frequencies(base: float, size: int, scaling: Mapping[str, Any]) -> Tensor:
    """YaRN (arXiv 2309.00071): interpolated, extrapolated, and a linear ramp between over the components."""
    original = scaling["original_max_position_embeddings"]

    def component(turns: float) -> float:
        """The component that turns so often within the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = component(scaling.get("beta_fast") or 32)
    high = component(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    interpolated = ((torch.arange(size // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    waves = base ** (torch.arange(0, size, 2, dtype=torch.float) / size)
    return interpolated / (scaling["factor"] * waves) + (1 - interpolated) / waves


def yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """The factor of cosine and sine: given, or from `factor` and DeepSeek's `mscale` and `mscale_all_dim`."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(scaling["factor"], mscale) / yarn_mscale(scaling["factor"], all_dim)
    return yarn_mscale(scaling["factor"])


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(factor) + 1; 1 without stretching."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention_factor(scaling: Mapping[str, Any], positions: int) -> float:
    """sqrt(1 + ln(factor) / ln(original length)), unless given; the factor is new length / original if not given."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or positions / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def switches_between(model: ModelConfig, before: int, after: int) -> bool:
    """Whether a sequence that grows from one length to another gets other frequencies for all its positions (longrope).

    What was cached before is then that of another sequence. Dynamic scaling changes with every token beyond the model's
    length; there the keys are turned anew, and the states below them are kept, as transformers keeps them.
    """
    scaling = model.rope_scaling or {}
    return scaling.get("rope_type") == "longrope" and before <= scaling["original_max_position_embeddings"] < after


class Rotary(nn.Module):
    """Cosines and sines for megatron-core's GPTModel, in place of its RotaryEmbedding.

    What travels through the decoder as `rotary_pos_emb` is a table [s, k, 2, r]: cosine and sine, with the attention
    factor in them, for full layers and, where they differ, sliding layers.
    """

    def __init__(self, model: ModelConfig, device: torch.device, cp_group: Any) -> None:
        super().__init__()
        self.model, self.device, self.cp_group = model, device, cp_group
        self.size = int(model.kv_channels * model.rotary_percent)
        self.kept: tuple[Any, Tensor] | None = None  # the table made last, and what it was made for
        self.kept_packed: tuple[Any, Tensor] | None = None  # the same for packed rows

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: Tensor, config: Any, packed: Any = None
    ) -> Any:
        """Positions of the table: the whole sequence, the cached part included; of packed rows, their `PackedRows`.

        megatron-core hands the answer to `forward` as it is.
        """
        if packed is not None:
            return packed
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = hidden.size(0) * config.context_parallel_size
        if config.sequence_parallel:
            length *= config.tensor_model_parallel_size
        return length + (inference_context.sequence_len_offset if inference_context is not None else 0)

    def forward(self, max_seq_len: Any, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """The table [s, k, 2, r] of positions `offset` to `offset + max_seq_len`, or of packed rows; [s/c, ...] under
        context parallelism."""
        group = cp_group if cp_group is not None else self.cp_group
        if not isinstance(max_seq_len, int):
            return self.packed(max_seq_len, group)
        return own_positions(self.counted(offset, offset + max_seq_len), 0, group)

    def counted(self, offset: int, stop: int) -> Tensor:
        """The table [s, k, 2, r] of positions `offset` to `stop` of a sequence that ends there."""
        made_for = self.made_for(stop)
        if self.kept is None or self.kept[0] != made_for or self.kept[1].size(0) < stop:
            # Half as much again, so that a cache that grows token by token does not make a table for each.
            self.kept = made_for, self.table(stop, stop + stop // 2)
        return self.kept[1][offset:stop]

    def packed(self, rows: Any, group: Any) -> Tensor:
        """The table [s/c, k, 2, r] of `PackedRows`: each row counts from 0, at the frequencies of its length.

        The layers of latent attention ask one by one; the chunks of an interleaved pipeline, batch by batch.
        """
        lengths, cut = rows.position_lengths, rows.cut
        if self.kept_packed is None or self.kept_packed[0] != (lengths, cut):
            longest_first = sorted(set(lengths), reverse=True)  # so that one kept table serves all where it can
            tables = {length: self.counted(0, length) for length in longest_first}
            whole = torch.cat([tables[length] for length in lengths])
            self.kept_packed = (lengths, cut), own_positions(whole, 0, group, cut)
        return self.kept_packed[1]

    def made_for(self, length: int) -> Any:
        """What the frequencies depend on besides the model."""
        scaling = self.model.rope_scaling or {}
        if scaling.get("rope_type") == "longrope":
            return length > scaling["original_max_position_embeddings"]
        if scaling.get("rope_type") == "dynamic":
            return max(length, self.model.max_position_embeddings)
        return None

    @torch.no_grad()
    def table(self, length: int, rows: int) -> Tensor:
        """Cosine and sine [rows, k, 2, r] with the frequencies of a sequence of `length`."""
        model = self.model
        positions = model.max_position_embeddings
        found = [inverse_frequencies(model.rotary_base, self.size, model.rope_scaling, length, positions)]
        if model.rotary_base_local is not None:
            found.append(inverse_frequencies(model.rotary_base_local, self.size))
        tables = []
        for frequencies, factor in found:
            angles = torch.outer(torch.arange(rows, dtype=torch.float), frequencies)
            whole = angles.repeat_interleave(2, 1) if model.rotary_interleaved else torch.cat([angles, angles], 1)
            tables.append(torch.stack([whole.cos() * factor, whole.sin() * factor], 1))
        return torch.stack(tables, 1).to(self.device)
