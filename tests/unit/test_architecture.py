"""The dependency rule, and what a fresh interpreter loads."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import grimp
import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]

# Who may read the configuration: the two programs, and the demo, which writes one for the service that it starts.
ENTRY_POINTS = {"service/__main__.py", "service/demo.py", "service/receive.py", "workers/__main__.py"}


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("service", "workers", include_external_packages=True, cache_dir=None)


def contracts() -> dict[str, dict[str, list[str]]]:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["name"]: contract for contract in linter["contracts"]}


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every contract of pyproject.toml is kept."""
    monkeypatch.chdir(ROOT)

    status = lint_imports(config_filename="pyproject.toml", no_cache=True)

    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_contract_names_every_part_of_the_service() -> None:
    """A new part of the service is closed to the workers from its first day."""
    (contract,) = (one for name, one in contracts().items() if name.startswith("the workers see"))
    parts = graph().find_children("service") - {"service.shared"}

    assert parts - set(contract["forbidden_modules"]) == set()


def test_contract_names_every_part_of_the_worker() -> None:
    """A new part of the worker is closed to Celery and the database from its first day."""
    contract = contracts()["only app, tasks, presence and reproduce know Celery and the database"]
    parts = graph().find_children("workers") - {
        "workers.__main__",
        "workers.app",
        "workers.presence",
        "workers.reproduce",
        "workers.tasks",
    }

    assert parts - set(contract["source_modules"]) == set()


def test_pruning_imports_torch_alone() -> None:
    """Outside the standard library and itself, workers.pruning imports torch and nothing else."""
    modules = {"workers.pruning"} | graph().find_descendants("workers.pruning")
    imported = {
        name.split(".")[0]
        for module in modules
        for name in graph().find_modules_directly_imported_by(module)
        if name not in modules
    }

    assert imported - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("service.__main__", ["torch", "transformers", "workers"]),
        ("workers.app", ["torch", "transformers", "pynetdicom", "highdicom"]),
        ("workers.__main__", ["torch", "transformers", "pynetdicom", "highdicom"]),
        ("workers.tasks", ["torch", "transformers", "pynetdicom", "highdicom"]),
    ],
)
def test_fresh_interpreter_leaves_out(module: str, absent: list[str]) -> None:
    """The service loads no GPU software, and the worker's parent neither torch nor DICOM networking."""
    script = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)

    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_configuration_is_read_in_the_entry_points_only() -> None:
    """Everything else is given its own section."""
    readers = {
        str(path.relative_to(ROOT))
        for package in ("service", "workers")
        for path in (ROOT / package).rglob("*.py")
        if _reads_configuration(path)
    }

    assert readers == ENTRY_POINTS


def _reads_configuration(path: Path) -> bool:
    """Does this module call `load` or `resolve` of service.shared.settings?"""
    tree = ast.parse(path.read_text())
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "service.shared.settings"
        for alias in node.names
        if alias.name in ("load", "resolve")
    }
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "service.shared"
        for alias in node.names
        if alias.name == "settings"
    }
    return any(
        (isinstance(node.func, ast.Name) and node.func.id in names)
        or (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in ("load", "resolve")
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in modules
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    )
