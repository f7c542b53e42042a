"""A process that holds the lifeline of a worker child."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from service.shared import lifeline\n"
    "with lifeline.held(Path(sys.argv[1]), sys.argv[2]): print(flush=True); {then}"
)


@contextmanager
def worker_named(name: str, data: Path, then: str = "time.sleep(600)") -> Iterator[subprocess.Popen[bytes]]:
    """It holds the lifeline while `then` runs, and is killed with the block."""
    command = [sys.executable, "-c", HOLD.format(then=then), str(data), name]
    process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def let_die(name: str, data: Path) -> None:
    with worker_named(name, data):
        pass
