"""megatron-core on a CPU: it sees the CPU as its device, and nothing else in the process does."""

import sys

import pytest

from tests.distributed.pool import pool

pytestmark = pytest.mark.distributed


def test_every_module_of_megatron_core_sees_the_cpu_and_nothing_else_does() -> None:
    facts = pool(1).run("tests.device.worker:view")[0]
    assert facts["modules"] > 100
    assert facts["real_torch_inside"] == 0
    assert facts["current_device"] == {"cpu"}
    assert facts["words_left"] == {}
    assert facts["modules_that_say_cpu"] > 20
    assert facts["bound_at_import"] == facts["made"] == "cpu"
    assert facts["outside"] == ("module", "torch.cuda", facts["outside"][2])
    assert facts["same"]
    assert facts["backend"] == "gloo"


def test_megatron_cores_random_state_is_the_cpus() -> None:
    assert pool(1).run("tests.device.worker:generators")[0] == (True, True)


def test_patches_are_in_place() -> None:
    facts = pool(1).run("tests.device.worker:patched")[0]
    assert facts
    assert all(facts.values()), facts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_all_groups_of_a_process_share_one_network_thread() -> None:
    for threads, total in pool(2).run("tests.device.worker:network_threads"):
        assert threads == 1
        assert total == 2**5
