"""The two rules by which turns are shortened, against their closed forms."""

import random

from mindspeed_llm.data.cutting import cut_turns, favour_shorter, proportional


def test_proportional_gives_the_answer_its_share_and_at_least_one_token() -> None:
    assert proportional(300, 100, 100) == (75, 25)
    assert proportional(1000, 1, 10) == (9, 1)
    assert proportional(3, 1000, 10) == (1, 9)
    assert proportional(5, 5, 100) == (5, 5)


def test_favour_shorter_keeps_a_side_that_takes_less_than_half() -> None:
    assert favour_shorter(1000, 20, 100) == (80, 20)
    assert favour_shorter(20, 1000, 100) == (20, 80)
    assert favour_shorter(100, 300, 100) == (25, 75)
    assert favour_shorter(10, 10, 100) == (10, 10)


def test_cut_turns_never_exceed_the_budget_and_keep_beginnings() -> None:
    draw = random.Random(5)
    for _ in range(500):
        pairs = [([1] * draw.randint(0, 40), [2] * draw.randint(0, 40)) for _ in range(draw.randint(1, 5))]
        budget = draw.randint(1, 150)
        whole = sum(len(s) + len(t) for s, t in pairs)
        for rule in (proportional, favour_shorter):
            cut = cut_turns(pairs, budget, rule)
            used = sum(len(s) + len(t) for s, t in cut)
            assert used <= budget
            assert cut == pairs if whole <= budget else True
            for (source, target), (full_source, full_target) in zip(cut, pairs, strict=False):
                assert source == full_source[: len(source)] and target == full_target[: len(target)]


def test_turns_beyond_the_budget_are_left_out() -> None:
    pairs = [([1] * 5, [2] * 5), ([3] * 5, [4] * 5), ([5] * 5, [6] * 5)]
    assert cut_turns(pairs, 10, proportional) == pairs[:1]
    assert cut_turns(pairs, 12, proportional) == [pairs[0], ([3], [4])]
