"""Choosing a device: names, the environment, what is missing."""

from pathlib import Path
from types import ModuleType

import pytest

from mindspeed_llm import device
from mindspeed_llm.device import cpu, cuda, npu
from mindspeed_llm.errors import InputError, UsageError


@pytest.fixture(autouse=True)
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not chosen yet, and that cannot really become a CPU one."""
    monkeypatch.setattr(device, "_selected", {})
    monkeypatch.delenv(device.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "create", lambda: "the CPU")
    for module in (cuda, npu):
        monkeypatch.setattr(module, "available", lambda: False)


def make_available(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "create", lambda: name)


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="'cudda'.*cuda"):
        device.select("cudda")


def test_the_environment_speaks_where_no_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.ENVIRONMENT_VARIABLE, "tpu")
    with pytest.raises(UsageError, match="'tpu'"):
        device.select()
    assert device.select("cpu") == "the CPU"


@pytest.mark.parametrize(("name", "missing"), [("cuda", "no CUDA GPU"), ("npu", "torch_npu")])
def test_an_absent_accelerator_is_an_error_that_names_the_way_out(name: str, missing: str) -> None:
    with pytest.raises(InputError, match=f"--device {name}: .*{missing}.*--device cpu"):
        device.select(name)


def test_auto_is_the_cpu_without_an_accelerator() -> None:
    assert device.select("auto") == "the CPU"


def test_auto_prefers_an_npu_to_a_gpu_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make_available(monkeypatch, cuda, "the GPU")
    assert device.detect() == "cuda"
    make_available(monkeypatch, npu, "the NPU")
    monkeypatch.setattr(device, "find_spec", lambda name: object())
    assert device.detect() == "npu"
    assert device.select() == "the NPU"


def test_a_process_cannot_change_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device.select("cpu")
    make_available(monkeypatch, cuda, "the GPU")
    with pytest.raises(InputError, match="already runs on 'cpu'; it cannot change to 'cuda'"):
        device.select("cuda")


def test_choosing_again_gives_the_same_device() -> None:
    assert device.select("cpu") is device.select("cpu")


def test_an_npu_needs_mindspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs MindSpeed .branch core_r0.16.0."):
        npu.create()


def test_memory_of_a_cpu_is_what_the_kernel_says() -> None:
    block = bytearray(b"x" * (64 << 20))
    now, peak = cpu.memory()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, highest = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    assert abs(now - resident) < 8 << 20
    assert abs(peak - highest) < 8 << 20
    assert len(block) < now <= peak + (8 << 20)
