"""How right are the reports, by finding, method, gamma and tau; what was kept; what it cost?

Phantoms (the default) are read by the bundled model or by --model; each is rendered and seen by the tower once, then
read under every setting, so that differences between settings are paired. A run that is stopped goes on where it was:
every answer is a line in --out. Real studies: --studies DIR (a folder per study) with --labels FILE, JSON:
{"study folder": {"findings": {"nodule": true, "effusion": false}, "report": "reference text"}}, either or both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.shared.settings import ModelSettings, PruningMethod, PruningSettings, ReportSettings
from workers.demo_model.accuracy import SMALLEST_CLAIMED_MM, Accuracy, Pair, Rate, accuracy_of, table
from workers.demo_model.assemble import WEIGHTS
from workers.demo_model.evaluate import HELD_OUT_SEEDS, PROTOCOLS, Reading, Study, look, read_together, study_of
from workers.demo_model.folder import MARK
from workers.demo_model.labels import Labels
from workers.demo_model.phantom import labels_at
from workers.demo_model.report_text import read

OUT = Path("var/bench/accuracy")
TOGETHER = 8  # studies in one batch of the language model
SIZES_MM = ((4, 6), (6, 8), (8, 12), (12, 20), (20, 31))
RESAMPLES = 2000


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


class Answers:
    """Readings of one run, a line each in a file, so that a run goes on where it was stopped."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.known: dict[tuple[int, str], Reading] = {}
        self.studies: dict[int, int] = {}  # seed -> slices of the thin series
        if path.exists():
            for line in path.read_text().splitlines():
                stored = json.loads(line)
                if stored.pop("model") != identity:
                    raise SystemExit(f"{path} holds answers of another model; choose another --out or remove it")
                name, thin = stored.pop("setting"), stored.pop("thin_slices")
                self.known[stored["seed"], name] = Reading(**stored)
                self.studies[stored["seed"]] = thin
        self.identity = identity

    def add(self, setting: Setting, study: Study, reading: Reading) -> None:
        line = asdict(reading) | {"setting": setting.name, "thin_slices": study.thin_slices, "model": self.identity}
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.known[reading.seed, setting.name] = reading
        self.studies[reading.seed] = study.thin_slices


def run(
    host: Any, seeds: range, settings: Sequence[Setting], protocol: str, answers: Answers, say: Callable[[str], Any]
) -> None:
    """Read what is not yet answered."""
    prompt = ReportSettings().prompt
    missing = [seed for seed in seeds if any((seed, one.name) not in answers.known for one in settings)]
    begun, done = monotonic(), 0
    for first in range(0, len(missing), TOGETHER):
        some = missing[first : first + TOGETHER]
        seen = [look(host, study_of(seed, PROTOCOLS[protocol])) for seed in some]
        for setting in settings:
            readings = read_together(host, seen, prompt, setting.pruning)
            for one, reading in zip(seen, readings, strict=True):
                if (reading.seed, setting.name) not in answers.known:
                    answers.add(setting, one.study, reading)
        done += len(some)
        left = (monotonic() - begun) / done * (len(missing) - done)
        say(f"{len(seeds) - len(missing) + done} of {len(seeds)} studies, about {left / 60:.0f} min left\n")


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


def measured(accuracy: Accuracy, seeds: Sequence[int]) -> dict[str, Any]:
    """What a report may quote of the weights: rates with their 95 % intervals, unpruned."""

    def rate(found: Rate) -> list[float]:
        return [round(value, 3) for value in (found.value, *found.interval)]

    return {
        "on": f"{accuracy.studies} computed phantoms of seeds {seeds[0]} to {seeds[-1]}, unpruned",
        "sensitivity": {name: rate(found.sensitivity) for name, found in accuracy.detections.items()},
        "precision": {name: rate(found.precision) for name, found in accuracy.detections.items()},
        "sensitivity_by_nodule_diameter": {name: rate(found) for name, found in accuracy.sensitivity_by_size.items()},
    }


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


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(arguments: list[str] | None = None, say: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(prog="bench accuracy", description=__doc__)
    parser.add_argument("--seeds", default="0-99", help="first-last of the phantoms (default %(default)s)")
    parser.add_argument("--methods", default="off,medpruner,guarded")
    parser.add_argument("--gamma", type=numbers, default=[0.05], help="of medpruner, comma-separated")
    parser.add_argument("--tau", type=numbers, default=[0.9], help="of medpruner and guarded, comma-separated")
    parser.add_argument("--budget", type=numbers, default=[0.5], help="of guarded: share of the input's tokens")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="slabs")
    parser.add_argument("--model", type=Path, help="a model folder; without it the bundled demonstration model")
    parser.add_argument("--studies", type=Path, help="real studies instead of phantoms, a folder each")
    parser.add_argument("--labels", type=Path, help="what is known of them, JSON")
    parser.add_argument("--out", type=Path, default=OUT, help="where answers, table and plot go (default %(default)s)")
    parser.add_argument(
        "--record", action="store_true", help="write the unpruned rates into the weights' medpruner.json"
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
    from workers.vlm import open_model

    host: Any = open_model(ModelSettings(threads=1, max_new_tokens=128), options.model)
    answers = Answers(options.out / f"answers-{options.protocol}.jsonl", host.identity.weights_sha256)
    run(host, seeds, settings, options.protocol, answers, say)
    text, rows = report(answers, seeds, settings, {seed: labels_at(seed) for seed in seeds})
    (options.out / "table.md").write_text(text)
    if options.record:
        mark = (options.model or WEIGHTS) / MARK
        known = json.loads(mark.read_text())
        mark.write_text(json.dumps(known | {"measured": measured(rows[0][2], seeds)}, indent=2) + "\n")
    plot(rows, options.out / "plot.png", f"{len(seeds)} phantoms, seeds {options.seeds}")
    say(text + f"\nWritten: {options.out / 'table.md'}, {options.out / 'plot.png'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
