"""Arrays computed once: one process builds, the others find the file or say where they looked."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.data.blend import Blend
from mindspeed_llm.data.index_cache import IndexCache, lengths_origin
from mindspeed_llm.data.sampler import EpochSampler, LengthGroupedSampler
from mindspeed_llm.errors import InputError


def test_an_array_is_built_once_and_found_by_the_others(tmp_path: Path) -> None:
    built = []

    def build() -> np.ndarray:
        built.append(1)
        return np.arange(5)

    rank0, rank1 = IndexCache(tmp_path / "new", True), IndexCache(tmp_path / "new", False, patience=5)
    for cache in (rank0, rank1, rank0):
        assert cache.array({"a": 1}, build).tolist() == [0, 1, 2, 3, 4]
    assert built == [1]
    assert rank0.array({"a": 2}, lambda: np.arange(3)).tolist() == [0, 1, 2], "another origin is another file"


def test_a_rank_waits_for_the_one_that_builds(tmp_path: Path) -> None:
    def late() -> None:
        time.sleep(0.3)
        IndexCache(tmp_path, True).array({"a": 1}, lambda: np.arange(4))

    thread = threading.Thread(target=late)
    thread.start()
    found = IndexCache(tmp_path, False, patience=20).array({"a": 1}, lambda: pytest.fail("only rank 0 builds"))
    thread.join()
    assert found.tolist() == [0, 1, 2, 3]


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not see .*npy after 0 s.*--no-shared-storage"):
        IndexCache(tmp_path, False, patience=0.1).array({"a": 1}, lambda: np.arange(4))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        IndexCache(tmp_path / "file", True).array({"a": 1}, lambda: np.arange(4))


def test_orders_from_the_cache_are_those_drawn_without_it(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 57)
    caches = [None, IndexCache(tmp_path, True), IndexCache(tmp_path, False, patience=5)]
    plain = [EpochSampler(57, 2, 0, 2, 3, seed=4, cache=cache) for cache in caches]
    grouped = [LengthGroupedSampler(lengths, 2, 1, 2, 3, seed=4, cache=cache) for cache in caches]
    blends = [Blend([20, 37], [2, 1], seed=4) for _ in caches]
    blended = [
        EpochSampler(57, 2, 0, 2, 3, 4, cache=cache, blend=blend) for cache, blend in zip(caches, blends, strict=True)
    ]
    assert plain[0].batch(0) != blended[0].batch(0)
    for samplers in (plain, grouped, blended):
        batches = [[sampler.batch(n) for n in range(0, 180, 12)] for sampler in samplers]
        assert batches[0] == batches[1] == batches[2]
    assert len(list(tmp_path.glob("*.npy"))) == 12, "four epochs of three kinds"
    assert lengths_origin(lengths) != lengths_origin(lengths[::-1])
