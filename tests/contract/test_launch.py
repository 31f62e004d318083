"""The launcher ends as the failing rank ends: its message, its exit status, nothing below it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, free_port

PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}\\n".encode())  # one call: two processes share the pipe
shown = __file__ + ".shown"
if rank == 0:
    open(shown, "w").close()
while not os.path.exists(shown):  # the first to fail ends the other
    time.sleep(0.01)
if rank == 1:
    %s
if %r:
    time.sleep(60)
"""


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("action", "waits", "status", "said"),
    [
        ("pass", False, 0, ""),
        ("sys.exit('prog: error: no such file')", True, 1, "prog: error: no such file\n"),
        ("print('prog: error: bad flag', file=sys.stderr); sys.exit(2)", True, 2, "prog: error: bad flag\n"),
        (KILL, True, 137, "launch: rank 1 was ended by SIGKILL, often for want of memory\n"),
    ],
)
def test_a_launch_ends_with_the_failing_ranks_line_and_status(
    tmp_path: Path, action: str, waits: bool, status: int, said: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM % (action, waits))
    launch = [sys.executable, str(REPO / "scripts" / "launch.py"), "--nproc_per_node", "2"]
    launch += ["--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the recipes set it; torchrun remarks on its absence
    result = subprocess.run([*launch, str(program)], capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == status
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]
    assert result.stderr == said
