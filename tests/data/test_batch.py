"""Micro-batches: shapes, the shift of labels, padding, and the cut of over-long rows against its closed form."""

import random
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.data.batch import CutRule, collate, collate_flat, cut_count, cut_row, first_overlong, turn_bounds
from mindspeed_llm.data.dataset import IndexedDataset
from mindspeed_llm.errors import InputError
from tests.data.test_dataset import make


def row(*turns: tuple[int, int], name: str = "row 7 of data") -> dict:
    """Turns of (untrained, trained) lengths; tokens count up from 1."""
    total = sum(s + t for s, t in turns)
    ids = np.arange(1, total + 1, dtype=np.int32)
    labels = ids.copy()
    at = 0
    for source, target in turns:
        labels[at : at + source] = -100
        at += source + target
    return {"input_ids": ids, "labels": labels, "attention_mask": np.ones(total, np.int32), "name": name}


def test_labels_are_the_next_token_and_the_mask_marks_the_trained_ones() -> None:
    batch = collate([row((2, 3)), row((1, 1))], pad_id=99, seq_length=8)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 99, 99, 99], [1, 2, 99, 99, 99, 99, 99, 99]]
    assert batch["labels"].tolist() == [[-100, 3, 4, 5, -100, -100, -100, -100], [2] + [-100] * 7]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["lengths"].tolist() == [5, 2]
    assert [batch[k].dtype for k in ("tokens", "labels", "loss_mask")] == [np.int64, np.int64, np.float32]


def test_the_loss_over_a_batch_equals_transformers_on_the_same_rows() -> None:
    torch = pytest.importorskip("torch")
    from transformers.loss.loss_utils import ForCausalLMLoss

    rows = [row((3, 4), (2, 2)), row((1, 5)), row((6, 1))]
    batch = collate(rows, pad_id=0, seq_length=12)
    logits = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0))
    unshifted = np.full((3, 12), -100)
    for i, sample in enumerate(rows):
        unshifted[i, : len(sample["labels"])] = sample["labels"]
    reference = ForCausalLMLoss(logits, torch.tensor(unshifted), vocab_size=32)
    labels, mask = torch.tensor(batch["labels"]), torch.tensor(batch["loss_mask"])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close((each * mask).sum() / mask.sum(), reference)


def test_padding_goes_to_the_longest_row_rounded_up_or_to_the_sequence_length() -> None:
    rows = [row((2, 3)), row((5, 5))]
    assert collate(rows, 0, 100, 8, pad_to_longest=True)["tokens"].shape == (2, 16)
    assert collate(rows, 0, 100, 1, pad_to_longest=True)["tokens"].shape == (2, 10)
    assert collate(rows, 0, 100)["tokens"].shape == (2, 100)
    assert collate(rows, 0, 101, 2)["tokens"].shape == (2, 102)


def test_turns_are_read_from_the_labels() -> None:
    assert turn_bounds(row((2, 3), (1, 2))["labels"]) == [(0, 2, 5), (5, 6, 8)]
    assert turn_bounds(np.array([5, 6, -100, 7, -100, -100])) == [(0, 0, 2), (2, 3, 6)]
    assert turn_bounds(np.array([-100, -100])) == [] and turn_bounds(np.array([])) == []


def test_the_cut_shortens_each_turn_in_proportion() -> None:
    ids, labels = cut_row(row((10, 90), (5, 5)), 50, CutRule.TURNS)
    # source takes less than half of the room: it stays whole, the answer gets the rest, the second turn is left out
    assert ids.tolist() == list(range(1, 51)) and labels.tolist() == [-100] * 10 + list(range(11, 51))
    ids, labels = cut_row(row((90, 10)), 50, CutRule.TURNS)
    assert ids.tolist() == list(range(1, 41)) + list(range(91, 101)), "the answer stays, the prompt loses its end"
    assert labels.tolist() == [-100] * 40 + list(range(91, 101))
    ids, _ = cut_row(row((60, 60)), 50, CutRule.TURNS)
    assert ids.tolist() == list(range(1, 26)) + list(range(61, 86))
    ids, _ = cut_row(row((60, 60)), 50, CutRule.HARD)
    assert ids.tolist() == list(range(1, 51))


def test_cut_rows_fit_keep_order_and_never_change_a_label() -> None:
    draw = random.Random(2)
    for _ in range(300):
        sample = row(*[(draw.randint(1, 30), draw.randint(1, 30)) for _ in range(draw.randint(1, 5))])
        limit = draw.randint(1, 120)
        for rule in (CutRule.TURNS, CutRule.HARD):
            ids, labels = cut_row(sample, limit, rule)
            assert len(ids) == len(labels) <= limit
            assert (np.diff(ids) > 0).all(), "tokens count up in these rows: order is kept, none is doubled"
            assert (labels == sample["labels"][ids - 1]).all()
            if len(sample["input_ids"]) <= limit:
                assert len(ids) == len(sample["input_ids"])


def test_rows_without_turns_and_packed_rows_are_cut_hard() -> None:
    untrained = {"input_ids": np.arange(10), "labels": np.full(10, -100)}
    assert cut_row(untrained, 4, CutRule.TURNS)[0].tolist() == [0, 1, 2, 3]
    packed = row((60, 60))
    packed["attention_mask"] = np.repeat([1, 2], 60)
    assert cut_row(packed, 50, CutRule.TURNS)[0].tolist() == list(range(1, 51))


def test_a_forbidden_cut_names_the_row_and_both_lengths() -> None:
    with pytest.raises(InputError, match="row 7 of data has 9 tokens, --seq-length is 5 and --no-cut-token"):
        collate([row((4, 5))], 0, 5, cut=CutRule.REFUSE)
    assert collate([row((2, 3))], 0, 5, cut=CutRule.REFUSE)["lengths"].tolist() == [5]


def test_overlong_rows_are_counted_by_their_lengths(tmp_path: Path) -> None:
    data = IndexedDataset(make(tmp_path / "a", [[1] * n for n in (3, 9, 5, 6, 5)]))
    assert cut_count(data, 5) == 2 and first_overlong(data, 5) == 1
    assert cut_count(data, 9) == 0 and first_overlong(data, 9) is None


def test_rows_without_padding_stand_one_after_the_other_with_their_bounds() -> None:
    rows = [row((3, 2)), row((1, 4), (2, 1)), row((2, 2))]
    flat = collate_flat(rows, pad_id=0, seq_length=100, pad_to_multiple_of=8)
    padded = collate(rows, pad_id=0, seq_length=100, pad_to_longest=True)
    assert flat["cu_seqlens"].tolist() == [0, 5, 13, 17, 24] and flat["cu_seqlens"].dtype == np.int32
    assert flat["lengths"].tolist() == [5, 8, 4] == padded["lengths"].tolist() and flat["max_seqlen"] == 8
    assert flat["tokens"].shape == flat["labels"].shape == flat["position_ids"].shape == (1, 24)
    for i, (begin, end) in enumerate([(0, 5), (5, 13), (13, 17)]):
        assert flat["tokens"][0, begin:end].tolist() == padded["tokens"][i, : end - begin].tolist()
        assert flat["labels"][0, begin:end].tolist() == padded["labels"][i, : end - begin].tolist()
        assert flat["position_ids"][0, begin:end].tolist() == list(range(end - begin))
    assert flat["loss_mask"].sum() == padded["loss_mask"].sum() and (flat["labels"][0, 17:] == -100).all()


def test_a_neat_pack_is_taken_apart_into_its_rows() -> None:
    parts = [row((3, 2)), row((1, 4)), row((2, 2))]
    padding = np.zeros(4, np.int32)
    packed = {
        "input_ids": np.concatenate([*(p["input_ids"] for p in parts), padding]),
        "labels": np.concatenate([*(p["labels"] for p in parts), padding - 100]),
        "attention_mask": np.repeat([1, 2, 3, 0], [5, 5, 4, 4]),
    }
    once, apart = (collate_flat(rows, 0, 100) for rows in ([packed], parts))
    for field in once:
        assert np.array_equal(once[field], apart[field]), field


def test_attention_and_positions_start_anew_behind_the_last_of_a_run_of_end_tokens() -> None:
    packed = {
        "input_ids": np.array([5, 6, 9, 4, 9, 7, 9, 9, 9]),
        "labels": np.array([-100, 6, 9, -100, 9, 7, 9, -100, -100]),
    }
    rows = [packed, row((2, 1))]
    plain, attention, positions, both = (
        collate_flat(rows, 0, 100, **ends)
        for ends in ({}, {"attention_end": 9}, {"position_end": 9}, {"attention_end": 9, "position_end": 9})
    )
    whole, parts = [0, 9, 12], [0, 3, 5, 9, 12]
    assert [b["cu_seqlens"].tolist() for b in (plain, attention, positions, both)] == [whole, parts, whole, parts]
    counted = [list(range(9)) + [0, 1, 2], [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]]
    found = [b["position_ids"][0].tolist() for b in (plain, attention, positions, both)]
    assert found == [counted[0], counted[0], counted[1], counted[1]]
    for batch in (attention, positions, both):
        assert np.array_equal(batch["labels"], plain["labels"]) and np.array_equal(batch["tokens"], plain["tokens"])


def test_over_long_rows_are_cut_alike_with_and_without_padding() -> None:
    rows = [row((30, 20)), row((3, 2))]
    for rule in (CutRule.TURNS, CutRule.HARD):
        flat, padded = collate_flat(rows, 0, 16, cut=rule), collate(rows, 0, 16, cut=rule)
        assert flat["tokens"][0, :16].tolist() == padded["tokens"][0].tolist() and flat["max_seqlen"] == 16
    with pytest.raises(InputError, match="row 7 of data has 50 tokens"):
        collate_flat(rows, 0, 16, cut=CutRule.REFUSE)
