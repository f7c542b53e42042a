"""`./run` is plain sh, and knows the verbs that the two programs have."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from service.__main__ import app as service_app
from workers.__main__ import app as workers_app

RUN = Path(__file__).parents[2] / "run"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RUN, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("shell", [["sh", "-n"], ["dash", "-n"]])
def test_run_is_plain_sh(shell: list[str]) -> None:
    """No syntax that only bash knows."""
    subprocess.run([*shell, RUN], check=True)


def test_usage_names_every_command_and_no_other(tmp_path: Path) -> None:
    """What the usage lists is what the two programs offer, beside `test`."""
    usage = run(cwd=tmp_path).stdout
    explained = set(re.findall(r"^  (demo|serve|worker|test) ", usage, re.MULTILINE))
    groups = re.findall(r"^  (?:talk to a PACS|look|change|audit|configuration|model) +(.*)$", usage, re.MULTILINE)
    known = set(get_command(service_app).commands) | set(get_command(workers_app).commands)

    assert explained | set(" ".join(groups).split()) == known | {"test"}


def test_verbs_reach_the_program_that_has_them() -> None:
    """Each command stands in the branch of its own program."""
    to_service, to_workers = re.findall(
        r"^    ([a-z |\\\n]+)\)\n        locked set_up service,worker\n", RUN.read_text(), re.M
    )

    assert set(get_command(service_app).commands) <= set(re.findall("[a-z]+", to_service))
    assert set(get_command(workers_app).commands) <= set(re.findall("[a-z]+", to_workers))


def test_unknown_verb_is_refused_by_name(tmp_path: Path) -> None:
    """A typing error sets nothing up; the usage and the verb are printed."""
    result = run("statsu", cwd=tmp_path)

    assert result.returncode == 1
    assert "unknown verb: statsu" in result.stderr
    assert "usage:" in result.stderr
