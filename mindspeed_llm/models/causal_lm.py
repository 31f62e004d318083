"""GPTModel with our rotary embedding, and a head that does no work for positions without a label.

Shapes: s sequence, b batch, h hidden, v vocabulary, m labelled positions; `/t` = divided by TP.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.head import frozen_head_loss
from mindspeed_llm.models.rope import Rotary

IGNORE = -100  # label of a position that is not trained


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding at this TP: the vocabulary rounded up to a multiple of TP."""
    return -(-vocab_size // tensor) * tensor


class CausalLM(GPTModel):
    """megatron-core's GPTModel whose loss runs over the labelled positions only.

    Where the model has them, the embedding's output is scaled and the logits are capped.

    Attributes:
        model: what is described by the family and config.json.
        first_layer: global number of this chunk's first decoder layer.
        vocabulary: true vocabulary size; rows from here on are padding and never win.
        answers_logits: with labels given, return the logits [m, v] of the labelled positions instead of their losses.
    """

    first_layer: int = 0
    vocabulary: int = 0
    answers_logits: bool = False
    embedding_scale: float | None = None
    logit_softcap: float | None = None

    def __init__(
        self, model: ModelConfig, config: Any, layers: Any, place: torch.device, first: bool, last: bool, vp_stage: Any
    ) -> None:
        """Build one stage.

        Args:
            config: megatron-core's configuration of the model.
            layers: the block's specification (`models.layer`).
            place: where it will run.
            first, last: whether it holds the embedding, and the output layer.
            vp_stage: its number under interleaving.
        """
        super().__init__(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocab_size(model.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        self.model = model
        if not model.multi_latent_attention:  # latent attention has its own embedding, within each layer
            self.rotary_pos_emb = Rotary(model, place, self.pg_collection.cp)
        self.vocabulary, self.logit_softcap = model.vocab_size, model.logit_softcap
        if model.embedding_scale is not None:  # rounded to the model's type, as transformers does
            self.embedding_scale = torch.tensor(model.embedding_scale, dtype=config.params_dtype).item()

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> tuple:
        """megatron-core's, on the scaled embedding where the model scales it.

        It cuts the padding mask for sequence parallelism on the first stage only (defect 16); here every stage does.
        """
        if self.embedding_scale is not None and self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids) * self.embedding_scale
        mask = kwargs.pop("padding_mask", None)
        found = super()._preprocess(input_ids, position_ids, decoder_input=decoder_input, **kwargs)
        if mask is not None and self.config.sequence_parallel:
            mask = mask.chunk(self.pg_collection.tp.size(), 1)[self.pg_collection.tp.rank()]
        return (*found[:5], mask, *found[6:])

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Hidden states between stages; on the last one the losses [m] (or logits [m, v]) of labelled positions.

        Without labels the logits [b, s, v/t] of all positions, as megatron-core gives them.

        Args:
            hidden_states: [s/t, b, h] under sequence parallelism, else [s, b, h].
            labels: [b, s], IGNORE where nothing is to be predicted.
        """
        if not self.post_process or labels is None:
            out = super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
            return self.cap(out) if self.post_process else out
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        flat = labels.transpose(0, 1).reshape(-1)
        chosen = (flat != IGNORE).nonzero().squeeze(1)
        hidden = hidden_states.reshape(-1, hidden_states.size(-1)).index_select(0, chosen).unsqueeze(1)
        if self.answers_logits:
            return self.head_logits(hidden, gather=True).squeeze(1)[:, : self.vocabulary]
        targets = flat.index_select(0, chosen)
        weight = self.head_weight
        if not weight.requires_grad and chosen.numel():
            given = (hidden.squeeze(1), weight, targets, self.vocabulary, self.logit_softcap)
            return frozen_head_loss(*given, not self.config.sequence_parallel, self.pg_collection.tp)
        logits = self.mask_padding_rows(self.head_logits(hidden, gather=False))
        return vocab_parallel_cross_entropy(logits.float(), targets.unsqueeze(1)).squeeze(1)

    @property
    def head_weight(self) -> Tensor:
        """The output layer's weight [v/t, h]: its own, or the embedding's when tied."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def head_logits(self, hidden: Tensor, gather: bool) -> Tensor:
        """The output layer on `hidden` [m, 1, h] -> [m, 1, v/t], or [m, 1, v] when gathered over TP."""
        head = self.output_layer
        # Under SP the sequence is whole by now, and the gather before this point sums its gradient over the TP ranks:
        # the head must neither gather nor reduce.
        kept = head.sequence_parallel, head.disable_grad_reduce
        head.sequence_parallel, head.disable_grad_reduce = False, kept[0] or kept[1]
        try:
            logits, _ = head(hidden, weight=self.head_weight, runtime_gather_output=gather)
        finally:
            head.sequence_parallel, head.disable_grad_reduce = kept
        return self.cap(logits)

    def cap(self, logits: Tensor) -> Tensor:
        """c * tanh(logits / c) where the model caps them, else the logits."""
        if self.logit_softcap is None:
            return logits
        return torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def mask_padding_rows(self, logits: Tensor) -> Tensor:
        """Logits [..., v/t] with the vocabulary's padding rows at -inf, so that they take no probability."""
        rank, width = self.pg_collection.tp.rank(), logits.size(-1)
        beyond = (rank + 1) * width - self.vocabulary
        if beyond <= 0 or not self.vocabulary:
            return logits
        keep = max(width - beyond, 0)
        return torch.cat(
            [logits[..., :keep], torch.full_like(logits[..., keep:], torch.finfo(logits.dtype).min)], dim=-1
        )
