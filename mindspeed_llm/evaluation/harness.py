"""lm-eval's view of our live model: log-likelihoods at any TP, PP and DP."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from megatron.core import parallel_state
from tqdm import tqdm

from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import InputError
from mindspeed_llm.inference.live import LiveModel

Request = tuple[tuple[str, str], list[int], list[int]]


class LiveLM(TemplateLM):
    """A live model behind lm-eval's interface.

    Every rank runs the same evaluation; the requests are divided over data-parallel replicas here and the results
    shared, so lm-eval itself sees a single process.
    """

    def __init__(self, model: LiveModel, tokenizer: Tokenizer, batch_size: int, max_length: int) -> None:
        super().__init__()
        self.live, self.vocabulary = model, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token."""
        if self.vocabulary.eos_id is None:
            raise InputError(f"{self.vocabulary.path}: the tokenizer has no end-of-text token")
        return self.vocabulary.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no special tokens, as lm-eval's HF backend does without add_bos_token."""
        return self.vocabulary.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, without its progress bar where nobody watches it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy choice) per request.

        Too long a row loses tokens on the left, as in lm-eval's HF backend. Requests that differ in their last token
        only (the answers A to D behind one question) share one forward pass.
        """
        group = parallel_state.get_data_parallel_group()
        replicas, replica = group.size(), parallel_state.get_data_parallel_rank()
        questions: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_, context, target) in enumerate(requests):
            row = tuple((context + target)[-(self.max_length + 1) :])
            questions.setdefault((row[:-1], len(target)), []).append(number)
        mine = sorted(list(questions)[replica::replicas], key=lambda question: -len(question[0]))
        speaker = torch.distributed.get_rank() == 0
        done: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(mine), unit="row", desc="scoring", disable=not speaker or None) as bar:
            for start in range(0, len(mine), self.batch_size):
                batch = mine[start : start + self.batch_size]
                finals = [[requests[number][2][-1] for number in questions[question]] for question in batch]
                rows, lengths = zip(*batch, strict=True)
                for question, scores in zip(batch, self.live.log_probabilities(rows, lengths, finals), strict=True):
                    done.update(zip(questions[question], scores, strict=True))
                bar.update(len(batch))
        shared: list[Any] = [None] * replicas
        torch.distributed.all_gather_object(shared, done, group=group)
        merged = {number: value for part in shared for number, value in part.items()}
        return [merged[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Perplexity tasks are not offered yet."""
        raise NotImplementedError("perplexity tasks are not supported; evaluation.py offers mmlu")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generating tasks are not offered yet."""
        raise NotImplementedError("generating tasks are not supported; evaluation.py offers mmlu")
