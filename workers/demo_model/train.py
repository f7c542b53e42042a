"""`./run train`: all stages, resumable; see the model card for what was run.

python -m workers.demo_model.train vision --folder var/train --steps 4000 --processes 2
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from workers.demo_model.assemble import WEIGHTS, assemble
from workers.demo_model.train_decoder import DecoderPlan, train_decoder
from workers.demo_model.train_vision import VisionPlan, train_vision

GIVEN = (
    *("seed", "steps", "minutes", "rate", "decay_from"),
    *("studies", "slabs", "moved", "watch"),
    *("short", "sharpen", "carry", "first"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train")
    parser.add_argument("stage", choices=("vision", "decoder", "assemble"))
    parser.add_argument("--folder", type=Path, default=Path("var/train"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="end the schedule after this time, if it is sooner")
    parser.add_argument("--start", type=Path, help="a model folder to begin a new training with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--decay-from", type=float)
    parser.add_argument("--studies", type=int, help="vision: of each step and process")
    parser.add_argument("--slabs", type=int, help="vision: of each study")
    parser.add_argument("--moved", type=int, help="vision: how often each scan is shown besides, moved a little")
    parser.add_argument("--watch", type=int, help="steps between looks at held-out studies")
    parser.add_argument("--short", type=float, help="decoder: share of the training with short readings")
    parser.add_argument("--sharpen", type=int, help="decoder: studies to fit the projection to; 0 leaves it as it is")
    parser.add_argument("--carry", type=int, help="decoder: studies to carry a new tower's tokens over to --start by")
    parser.add_argument("--first", type=int, help="decoder: studies encoded before the first step")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu or cuda")
    parser.add_argument("--makers", type=int, default=0, help="processes that make studies for each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rank", type=int, help="be this one of the processes, and start none")
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="assemble: where the model folder goes")
    parser.add_argument("--mean-with", type=Path, help="assemble: a model folder; write the mean with it")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.stage == "assemble":
        assemble(options.folder, options.out, options.mean_with)
        return 0
    if options.rank is not None:
        _work(options.rank, options)
    elif options.processes > 1:
        # numpy's threads of one process would take the cores of the others; read when a process first loads it
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        spawn(_work, (options,), nprocs=options.processes)  # type: ignore[no-untyped-call]
    else:
        _work(0, options)
    return 0


def _work(rank: int, options: argparse.Namespace) -> None:
    """One process of the training; torch uses one thread, which is the fastest for so small a model."""
    torch.set_num_threads(1)
    if options.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{options.port}", rank=rank, world_size=options.processes
        )
    given: dict[str, Any] = {name: getattr(options, name) for name in GIVEN if getattr(options, name, None) is not None}
    shared: dict[str, Any] = {
        "start": options.start,
        "rank": rank,
        "processes": options.processes,
        "device": options.device,
        "makers": options.makers,
        "say": _say,
    }
    if options.stage == "vision":
        train_vision(options.folder, VisionPlan(**given), **shared)
    else:
        train_decoder(options.folder, DecoderPlan(**given), **shared)
    if options.processes > 1:
        torch.distributed.destroy_process_group()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
