"""How right are the reports, by finding, method, gamma and tau; what was kept; what it cost?

Phantoms (the default) are read by the bundled model or by --model, in as many processes as there are cores; each is
rendered and seen by the tower once, then read under every setting, so that differences between settings are paired. A
run that is stopped, killed too, goes on where it was: every answer is a line in --out.

Real studies: --studies DIR (a folder per study) with --labels FILE, JSON:
{"study folder": {"findings": {"nodule": true, "effusion": false}, "report": "reference text"}}, either or both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.shared.settings import ModelSettings, PruningMethod, PruningSettings, ReportSettings
from tests.bench.accuracy_record import record
from workers.demo_model.accuracy import SMALLEST_CLAIMED_MM, Accuracy, Pair, Rate, accuracy_of, table
from workers.demo_model.assemble import WEIGHTS
from workers.demo_model.evaluate import HELD_OUT_SEEDS, PROTOCOLS, Reading, look, read_together, study_of
from workers.demo_model.labels import Labels
from workers.demo_model.phantom import labels_at
from workers.demo_model.report_text import read

OUT = Path("var/bench/accuracy")
TOGETHER = 8  # studies in one batch of the language model
SIZES_MM = ((4, 6), (6, 8), (8, 12), (12, 20), (20, 31))
RESAMPLES = 2000
GRID = {"gamma": [0.05], "tau": [0.9], "budget": [0.5]}


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    name: str
    pruning: PruningSettings


def settings_of(
    methods: Sequence[str], gammas: Sequence[float], taus: Sequence[float], budgets: Sequence[float]
) -> list[Setting]:
    """`off` once; `medpruner` for every gamma and tau; `guarded`, which has no gamma, for every budget and tau."""
    found = []
    for method in methods:
        if method == PruningMethod.OFF:
            found.append(Setting("off", PruningSettings(method=PruningMethod.OFF)))
        elif method == PruningMethod.MEDPRUNER:
            for gamma in gammas:
                for tau in taus:
                    pruning = PruningSettings(method=PruningMethod.MEDPRUNER, gamma=gamma, tau=tau)
                    found.append(Setting(f"medpruner gamma {gamma:g} tau {tau:g}", pruning))
        else:
            for budget in budgets:
                for tau in taus:
                    pruning = PruningSettings(method=PruningMethod.GUARDED, token_budget=budget, tau=tau)
                    found.append(Setting(f"guarded budget {budget:g} tau {tau:g}", pruning))
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    """One study read under one setting. thin_slices: of the same phantom's thin series."""

    setting: str
    thin_slices: int
    reading: Reading


class Answers:
    """Readings of one run, a line each in a file, so that a run goes on where it was stopped."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.known: dict[tuple[int, str], Reading] = {}
        self.studies: dict[int, int] = {}  # seed -> slices of the thin series
        self.identity = identity
        if not path.exists():
            return
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:  # killed while it wrote the last line
            os.truncate(path, len(whole))
        for line in whole.splitlines():
            stored = json.loads(line)
            if stored.pop("model") != identity:
                raise SystemExit(f"{path} holds answers of another model; choose another --out or remove it")
            self._keep(Answer(stored.pop("setting"), stored.pop("thin_slices"), Reading(**stored)))

    def _keep(self, answer: Answer) -> None:
        self.known[answer.reading.seed, answer.setting] = answer.reading
        self.studies[answer.reading.seed] = answer.thin_slices

    def add(self, answers: Sequence[Answer]) -> None:
        """What is already known stays as it was first said."""
        new = [one for one in answers if (one.reading.seed, one.setting) not in self.known]
        with self.path.open("a") as stream:
            for one in new:
                line = asdict(one.reading) | {"setting": one.setting, "thin_slices": one.thin_slices}
                stream.write(json.dumps(line | {"model": self.identity}) + "\n")
        for one in new:
            self._keep(one)


@dataclass(frozen=True, slots=True)
class Task:
    """Some studies, read together under each of these settings by this model in this process."""

    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]
    protocol: str


def tasks_of(seeds: Sequence[int], settings: Sequence[Setting], protocol: str, answers: Answers) -> list[Task]:
    """What is not yet answered; studies that lack the same settings go together."""
    lacking: dict[tuple[Setting, ...], list[int]] = {}
    for seed in seeds:
        open_ = tuple(one for one in settings if (seed, one.name) not in answers.known)
        if open_:
            lacking.setdefault(open_, []).append(seed)
    return [
        Task(tuple(some[first : first + TOGETHER]), wanted, protocol)
        for wanted, some in lacking.items()
        for first in range(0, len(some), TOGETHER)
    ]


def read_task(host: Any, task: Task) -> list[Answer]:
    seen = [look(host, study_of(seed, PROTOCOLS[task.protocol])) for seed in task.seeds]
    return [
        Answer(setting.name, one.study.thin_slices, reading)
        for setting in task.settings
        for one, reading in zip(seen, read_together(host, seen, ReportSettings().prompt, setting.pruning), strict=True)
    ]


_HOSTS: list[Any] = []  # the one model of a process of the pool


def open_host(folder: Path | None) -> Any:
    from workers.vlm import open_model

    return open_model(ModelSettings(threads=1, max_new_tokens=128), folder)


def _begin(folder: Path | None) -> None:
    _HOSTS.append(open_host(folder))


def _read_in_pool(task: Task) -> list[Answer]:
    return read_task(_HOSTS[0], task)


@contextmanager
def readers(host: Any, folder: Path | None, processes: int) -> Iterator[Callable[[list[Task]], Iterator[list[Answer]]]]:
    """A way to read tasks, whose answers come as they are ready: in this process or in several."""
    if processes == 1:
        yield lambda tasks: (read_task(host, task) for task in tasks)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(folder,)
    ) as pool:
        try:
            yield lambda tasks: (done.result() for done in as_completed([pool.submit(_read_in_pool, t) for t in tasks]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run(
    read_all: Callable[[list[Task]], Iterator[list[Answer]]],
    tasks: list[Task],
    answers: Answers,
    say: Callable[[str], Any],
) -> None:
    """Read what is not yet answered, and write each answer down at once."""
    begun, done, wanted = monotonic(), 0, sum(len(task.seeds) for task in tasks)
    for some in read_all(tasks):
        answers.add(some)
        done += len({one.reading.seed for one in some})
        each = (monotonic() - begun) / done
        left = f"about {each * (wanted - done) / 60:.0f} min left"
        say(f"{done} of {wanted} studies, {each:.2f} s each, {left}\n")


Outcome = NDArray[np.bool_]  # (studies, 3): does it count, is it there, was it said


def outcomes(pairs: Sequence[Pair]) -> dict[str, Outcome]:
    """Per finding what `accuracy_of` counts, study by study, for the paired comparison."""
    found: dict[str, list[tuple[bool, bool, bool]]] = {}
    for truth, said in pairs:
        chest = truth.supported
        claimed = not truth.nodules or max(n.diameter_mm for n in truth.nodules) >= SMALLEST_CLAIMED_MM
        rows = {
            f"nodule >= {SMALLEST_CLAIMED_MM} mm": (chest and claimed, bool(truth.nodules), bool(said.nodules)),
            "effusion": (chest, truth.effusion is not None, said.effusion is not None),
            "consolidation": (chest, truth.consolidation is not None, said.consolidation is not None),
            "pneumothorax": (chest, truth.pneumothorax is not None, said.pneumothorax is not None),
            "cardiomegaly": (chest, truth.cardiomegaly, said.cardiomegaly),
            "aortic calcification": (chest, truth.calcification, said.calcification),
            "not supported": (True, not truth.supported, not said.supported),
        }
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    return {name: np.array(rows, bool) for name, rows in found.items()}


def rates(outcome: Outcome, weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sensitivity and precision for each row of weights, (R, studies)."""
    counts, there, said = outcome.T
    hits = weight @ (counts & there & said)
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / (weight @ (counts & there)), hits / (weight @ (counts & said))


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a rate under a setting and under `off`, on the same studies."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "none named"
        return f"{100 * self.value:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def paired(with_pruning: Outcome, without: Outcome, seed: int = 0) -> tuple[Difference, Difference]:
    """Differences of sensitivity and precision, with 95 % intervals by a bootstrap over studies."""
    studies = len(without)
    once = np.ones((1, studies))
    drawn = np.random.default_rng(seed).multinomial(studies, [1 / studies] * studies, RESAMPLES).astype(np.float64)
    found = []
    for index in (0, 1):
        point = rates(with_pruning, once)[index][0] - rates(without, once)[index][0]
        spread = rates(with_pruning, drawn)[index] - rates(without, drawn)[index]
        known = spread[np.isfinite(spread)]
        low, high = np.percentile(known, (2.5, 97.5)) if known.size else (np.nan, np.nan)
        found.append(Difference(float(point), float(low), float(high)))
    return found[0], found[1]


def report(
    answers: Answers, seeds: Sequence[int], settings: Sequence[Setting], truths: dict[int, Labels]
) -> tuple[str, list[Any]]:
    """The tables in Markdown, and one row per setting for the plot."""
    lines: list[str] = []
    rows: list[tuple[str, float, Accuracy]] = []
    base: dict[str, Outcome] | None = None
    funnel = [
        "| setting | slices kept | of the input's tokens | of the thin series' tokens | CPU s per study |",
        "|---|---|---|---|---|",
    ]
    differences = ["| setting | finding | sensitivity | precision |", "|---|---|---|---|"]
    survival = [f"| setting | {' | '.join(f'{a}-{b} mm' for a, b in SIZES_MM)} |", "|---|" + "---|" * len(SIZES_MM)]
    for setting in settings:
        found = [answers.known[seed, setting.name] for seed in seeds]
        pairs = [(truths[one.seed], read(one.text)) for one in found]
        accuracy = accuracy_of(pairs)
        each_in, each_kept = sum(one.tokens_in for one in found), sum(one.tokens_kept for one in found)
        per_slice = found[0].tokens_in / found[0].slices_in
        thin = sum(answers.studies[one.seed] * per_slice for one in found)
        slices = sum(one.slices_kept for one in found) / sum(one.slices_in for one in found)
        funnel.append(
            f"| {setting.name} | {slices:.1%} | {each_kept / each_in:.1%} | {each_kept / thin:.1%} "
            f"| {mean(one.cpu_s for one in found):.2f} |"
        )
        lines += [f"### {setting.name}", "", table(accuracy)]
        rows.append((setting.name, each_kept / each_in, accuracy))
        now = outcomes(pairs)
        if setting.pruning.method is PruningMethod.OFF:
            base = now
        elif base is not None:
            for name, outcome in now.items():
                sensitivity, precision = paired(outcome, base[name])
                differences.append(f"| {setting.name} | {name} | {sensitivity} | {precision} |")
        survival.append(f"| {setting.name} | {' | '.join(map(str, survivors(found, truths)))} |")
    text = [
        f"{len(seeds)} phantoms of seeds {seeds[0]} to {seeds[-1]}. Kept, and CPU seconds (phantoms not counted):",
        "",
        *funnel,
        "",
        "Nodules with a token of their own kept, by diameter (95 % intervals by Wilson):",
        "",
        *survival,
        "",
    ]
    if len(differences) > 2:
        text += [
            "Points more or less than `off` on the same studies (95 % intervals by bootstrap):",
            "",
            *differences,
            "",
        ]
    return "\n".join([*text, *lines]), rows


def survivors(found: Sequence[Reading], truths: dict[int, Labels]) -> list[Rate]:
    """How many nodules of each size kept a token."""
    result = []
    for low, high in SIZES_MM:
        some = [
            one.survived
            for one in found
            if one.survived is not None and low <= max(n.diameter_mm for n in truths[one.seed].nodules) < high
        ]
        result.append(Rate(sum(some), len(some)))
    return result


def plot(rows: Sequence[tuple[str, float, Accuracy]], path: Path, title: str) -> None:
    """F1 per finding over the share of tokens kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    order = sorted(rows, key=lambda row: row[1])
    for finding in order[0][2].detections:
        axes.plot(
            [100 * row[1] for row in order], [row[2].detections[finding].f1 for row in order], "o-", label=finding
        )
    for name, share, _ in order:
        axes.annotate(name, (100 * share, 0.02), rotation=90, fontsize=6, va="bottom", ha="center")
    axes.set(xlabel="tokens kept, % of the model's own input", ylabel="F1", ylim=(0, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _command(options: argparse.Namespace) -> str:
    """The run as somebody else would repeat it."""
    grid = "".join(
        f" --{name} {','.join(f'{value:g}' for value in given)}"
        for name, default in GRID.items()
        if (given := getattr(options, name)) != default
    )
    return f"./run bench accuracy --seeds {options.seeds} --methods {options.methods}{grid} --record"


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(arguments: list[str] | None = None, say: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(prog="bench accuracy", description=__doc__)
    parser.add_argument("--seeds", default="0-99", help="first-last of the phantoms (default %(default)s)")
    parser.add_argument("--methods", default="off,medpruner,guarded")
    parser.add_argument("--gamma", type=numbers, default=GRID["gamma"], help="of medpruner, comma-separated")
    parser.add_argument("--tau", type=numbers, default=GRID["tau"], help="of medpruner and guarded, comma-separated")
    parser.add_argument(
        "--budget", type=numbers, default=GRID["budget"], help="of guarded: share of the input's tokens"
    )
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="slabs")
    parser.add_argument("--model", type=Path, help="a model folder; without it the bundled demonstration model")
    parser.add_argument("--studies", type=Path, help="real studies instead of phantoms, a folder each")
    parser.add_argument("--labels", type=Path, help="what is known of them, JSON")
    parser.add_argument("--out", type=Path, default=OUT, help="where answers, table and plot go (default %(default)s)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(default %(default)s)")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write what was measured, and the limitations that follow, into the weights' medpruner.json and card",
    )
    options = parser.parse_args(arguments)
    settings = settings_of(options.methods.split(","), options.gamma, options.tau, options.budget)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.record and settings[0].pruning.method is not PruningMethod.OFF:
        parser.error("--record records unpruned rates: --methods must begin with off")
    if (options.studies is None) != (options.labels is None):
        parser.error("--studies and --labels belong together")
    if options.studies is not None:
        from tests.bench.real_studies import compare

        text = compare(options.model, options.studies, options.labels, [(s.name, s.pruning) for s in settings], say)
        (options.out / "real.md").write_text(text)
        say(text)
        return 0
    first, last = (int(part) for part in options.seeds.split("-"))
    seeds = range(first, last + 1)
    if first > last or last not in HELD_OUT_SEEDS:
        parser.error(f"--seeds: {options.seeds}: first-last, below {HELD_OUT_SEEDS.stop}; others were trained on")
    host = open_host(options.model)
    answers = Answers(options.out / f"answers-{options.protocol}.jsonl", host.identity.weights_sha256)
    tasks = tasks_of(seeds, settings, options.protocol, answers)
    with readers(host, options.model, min(options.processes, max(1, len(tasks)))) as read_all:
        run(read_all, tasks, answers, say)
    text, rows = report(answers, seeds, settings, {seed: labels_at(seed) for seed in seeds})
    (options.out / "table.md").write_text(text)
    if options.record:
        record(options.model or WEIGHTS, rows[0][2], seeds, text, _command(options))
    plot(rows, options.out / "plot.png", f"{len(seeds)} phantoms, seeds {options.seeds}")
    say(text + f"\nWritten: {options.out / 'table.md'}, {options.out / 'plot.png'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
