"""Prompts to answers, as token ids: token after token with a key-value cache, or by beam search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mindspeed_llm.errors import InputError
from mindspeed_llm.inference.live import LiveModel
from mindspeed_llm.inference.sampling import BeamSampling, Sampler


@dataclass(frozen=True)
class Limits:
    """When an answer ends.

    Attributes:
        max_new_tokens: longest answer. max_length: longest prompt and answer together.
        stop_ids: tokens that end an answer; they are not part of it.
    """

    max_new_tokens: int
    max_length: int
    stop_ids: frozenset[int]

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that may follow `prompt`; `InputError` when there is room for none."""
        if not prompt:
            raise InputError("the prompt is empty: it has no token to continue")
        room = min(self.max_new_tokens, self.max_length - len(prompt))
        if room < 1:
            raise InputError(
                f"Length of prompt + tokens_to_generate longer than allowed: the prompt has {len(prompt)} tokens, the "
                f"limit is {self.max_length} (--max-length, or the model's own); shorten the prompt"
            )
        return room


def generate(
    model: LiveModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    choose: Sampler,
    use_cache: bool = True,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answers to prompts of one length, without the stop token.

    Args:
        choose: logits [b, v] -> token ids [b].
        on_token: told each token of the first answer as it comes.
    """
    length = len(prompts[0])
    if any(len(prompt) != length for prompt in prompts):
        raise ValueError("prompts of one call have one length; group them before")
    room = limits.room(prompts[0])
    tokens = torch.tensor(prompts, dtype=torch.long, device=model.device)
    cache = model.cache(len(prompts), length + room) if use_cache else None
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    step = tokens
    for _ in range(room):
        chosen = choose(model.next_logits(step, cache))
        for row, token in enumerate(chosen.tolist()):
            if row not in open_rows:
                continue
            if token in limits.stop_ids:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if row == 0 and on_token is not None:
                on_token(token)
        if not open_rows:
            break
        step = chosen.unsqueeze(1)
        if cache is None:
            tokens = step = torch.cat([tokens, step], dim=1)
    return answers


@dataclass(frozen=True)
class Beam:
    """A partial answer and the sum of its tokens' log-probabilities."""

    tokens: tuple[int, ...]
    score: float


def beam_search(
    model: LiveModel,
    prompt: Sequence[int],
    limits: Limits,
    beams: int,
    length_penalty: float = 1.0,
    sampling: BeamSampling | None = None,
    use_cache: bool = True,
) -> list[int]:
    """The answer whose log-probability divided by length ** length_penalty is highest among `beams` kept at a time.

    Each step considers the best continuations of all beams, enough that `beams` of them go on even when every stop
    token of every beam is among them, as transformers does; a finished one counts only when it is among the best
    `beams`.

    Args:
        sampling: draw the continuations instead of taking the best ones.
    """
    room = limits.room(prompt)
    cache = model.cache(beams, len(prompt) + room) if use_cache else None
    step = torch.tensor([list(prompt)] * beams, dtype=torch.long, device=model.device)
    alive = [Beam((), 0.0)] + [Beam((), -1e9)] * (beams - 1)
    finished: list[Beam] = []
    for _ in range(room):
        scores = torch.log_softmax(model.next_logits(step, cache), -1)
        scores = scores if sampling is None else sampling.warp(scores)
        total = (scores + torch.tensor([[beam.score] for beam in alive], device=scores.device)).flatten()
        rank = total if sampling is None else sampling.rank(total)
        best = rank.topk(min((1 + max(len(limits.stop_ids), 1)) * beams, total.numel())).indices
        chosen: list[tuple[int, Beam]] = []
        for place, (score, flat) in enumerate(zip(total[best].tolist(), best.tolist(), strict=True)):
            parent, token = divmod(flat, scores.size(1))
            if token in limits.stop_ids:
                if place < beams:
                    finished.append(Beam(alive[parent].tokens, score))
            elif len(chosen) < beams:
                chosen.append((parent, Beam((*alive[parent].tokens, token), score)))
        alive = [beam for _, beam in chosen]
        if len(finished) >= beams and _settled(alive, finished, length_penalty, beams):
            break
        if cache is None:
            step = torch.tensor([[*prompt, *beam.tokens] for beam in alive], dtype=torch.long, device=model.device)
        else:
            cache.swap_key_value_dict([parent for parent, _ in chosen])
            step = torch.tensor([[beam.tokens[-1]] for beam in alive], dtype=torch.long, device=model.device)
    ranked = [(_mean(beam, length_penalty, True), beam) for beam in finished]
    ranked += [(_mean(beam, length_penalty, False), beam) for beam in alive]
    return list(max(ranked, key=lambda pair: pair[0])[1].tokens)


def _mean(beam: Beam, length_penalty: float, ended: bool) -> float:
    """The beam's score per token ** length_penalty; an ended beam's stop token counts."""
    return beam.score / max(len(beam.tokens) + ended, 1) ** length_penalty


def _settled(alive: list[Beam], finished: list[Beam], length_penalty: float, beams: int) -> bool:
    """Whether no living beam, ended now, would beat the worst of the best finished ones."""
    worst = sorted((_mean(beam, length_penalty, True) for beam in finished), reverse=True)[beams - 1]
    return max(_mean(beam, length_penalty, False) for beam in alive) <= worst
