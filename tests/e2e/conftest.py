"""Fixtures of the whole way: a tiny model, and a PACS. The service itself is started by `tests.running.Service`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Storescp

SEED = 20261123


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with random weights: an analysis takes seconds, its text is noise."""
    folder = tmp_path_factory.mktemp("model")
    # in a process of its own: torch need not be in the one that runs the tests
    program = "import sys; from pathlib import Path; from workers.demo_model.random_weights import write; "
    program += "write(Path(sys.argv[1]), int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", program, str(folder), str(SEED)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def storescp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storescp]:
    """A PACS that takes what it is sent, AE title PACS."""
    with Storescp(tmp_path_factory.mktemp("pacs")) as server:
        yield server
