"""`./run prove NAME [ARGUMENTS]`: each proof is a module here with main(arguments). Without a name: the list."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def proofs() -> dict[str, str]:
    """Name -> the first line of its docstring, without importing any."""
    found = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    known = proofs()
    if not arguments or arguments[0] not in known:
        for name, what in known.items():
            print(f"{name:12} {what}", file=sys.stderr)  # noqa: T201
        return 0 if not arguments else 2
    module = importlib.import_module(f"tests.prove.{arguments[0]}")
    return int(module.main(arguments[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
