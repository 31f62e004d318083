"""How an over-long conversation is shortened: turn by turn, in proportion to its two sides.

Both rules divide what is left of the budget between a turn's source (prompt) and target (answer); turns that would
start beyond the budget are left out. Lengths are in tokens.
"""

from collections.abc import Callable, Sequence

Pair = tuple[list[int], list[int]]
Division = Callable[[int, int, int], tuple[int, int]]


def proportional(source: int, target: int, budget: int) -> tuple[int, int]:
    """Lengths kept of a turn: the target gets its share of the budget, at least one token, the source the rest."""
    if source + target == 0:
        return 0, 0
    allowed_target = max(int(budget * (target / (source + target))), 1)
    allowed_source = budget - min(allowed_target, target)
    return min(source, allowed_source), min(target, allowed_target)


def favour_shorter(source: int, target: int, budget: int) -> tuple[int, int]:
    """Lengths kept of a turn: only the longer side is shortened while the other takes less than half the budget."""
    if 2 * target < budget:
        kept_target = target
    elif 2 * source < budget:
        kept_target = min(target, budget - source)
    else:
        kept_target = min(target, int(budget * (target / (source + target))))
    return min(source, max(budget - kept_target, 0)), kept_target


def cut_turns(pairs: Sequence[Pair], budget: int, divide: Division) -> list[Pair]:
    """The turns that fit into `budget` tokens, each divided by `divide(source, target, tokens left)`."""
    if sum(len(source) + len(target) for source, target in pairs) <= budget:
        return list(pairs)
    kept: list[Pair] = []
    used = 0
    for source, target in pairs:
        if used >= budget:
            break
        source_length, target_length = divide(len(source), len(target), budget - used)
        kept.append((source[:source_length], target[:target_length]))
        used += source_length + target_length
    return kept
