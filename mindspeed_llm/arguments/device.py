"""Where it runs."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option


@dataclass
class DeviceOptions:
    """Device."""

    device: str = option(
        "auto",
        help="Kind of machine to run on; auto takes the NPU or GPU that is present, else the CPU.",
        choices=("auto", "cpu", "cuda", "npu"),
        env="MINDSPEED_LLM_DEVICE",
    )
    distributed_timeout_minutes: int = option(
        30,
        help="How long a process waits for the others in one collective before the run is ended as hung.",
        unit="minutes",
    )
