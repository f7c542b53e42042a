"""`./run bench NAME`: benchmarks, each a module with main(arguments). Without a name they are listed."""

from __future__ import annotations

import importlib.util
import sys

MODULES = {  # name -> module of this package and what it measures
    "lesions": ("lesion_survival", "which nodules are still shown after pruning, by size, method and token budget"),
    "pruning": ("pruning", "time and memory of the pruning stages and of a pruned read, on the CPU"),
    "vlm": ("vlm", "time to first token at the dimensions of real models, on a GPU"),
}


def main(arguments: list[str]) -> int:
    here = {name: entry for name, entry in MODULES.items() if importlib.util.find_spec(f"tests.bench.{entry[0]}")}
    if not arguments or arguments[0] not in here:
        for name, (_, what) in here.items():
            print(f"{name:10} {what}", file=sys.stderr)  # noqa: T201
        return 0 if not arguments else 2
    module = importlib.import_module(f"tests.bench.{here[arguments[0]][0]}")
    return int(module.main(arguments[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
