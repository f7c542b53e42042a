"""History as tables for a terminal, or as JSON. Knows rich and nothing of the database."""

from __future__ import annotations

import csv
import json
import unicodedata
from datetime import datetime
from enum import StrEnum
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]

COLOURS = {
    "receiving": "cyan",
    "queued": "cyan",
    "running": "cyan",
    "read": "cyan",
    "pending": "yellow",
    "complete": "green",
    "done": "green",
    "delivered": "green",
    "committed": "green",
    "built": "green",
    "refused": "magenta",
    "superseded": "bright_black",
    "cancelled": "bright_black",
    "failed": "red",
    "rejected": "red",
    "quarantined": "red",
}


def print_json(value: Any) -> None:
    """Plain JSON on standard output, times as ISO 8601, for other programs."""
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        json.dumps(value, default=_plain, indent=1)
    )


def print_history_csv(stream: TextIO, rows: list[Row]) -> None:
    """One line a study; counts and deliveries as JSON."""
    table = csv.DictWriter(stream, HISTORY_COLUMNS)
    table.writeheader()
    for row in rows:
        table.writerow({name: _cell(row[name]) for name in HISTORY_COLUMNS})


def print_stats(console: Console, found: Row) -> None:
    since = f", since {found['since']:%Y-%m-%d %H:%M} UTC" if found.get("since") else ""
    table = Table(title=f"medpruner-pacs{since}", title_justify="left", show_header=False)
    table.add_row("studies", str(found["studies"]))
    table.add_row("instances", f"{found['instances']}, {found['bytes'] / 1e9:.2f} GB")
    table.add_row("analyses", _state_counts(found["analyses"]))
    table.add_row("routes", _pairs(found["routes"]) or "none")
    table.add_row("reasons", _foreign(_pairs(found["reasons"]) or "none"))
    for destination, states in found["deliveries"].items():
        table.add_row(f"deliveries to {destination}", _state_counts(states))
    for key, words in SPREADS.items():
        if found[key]:
            table.add_row(words, _spread(found[key]))
    for step, spread in found["steps_s"].items():
        table.add_row(f"  {step}", _spread(spread))
    console.print(table)


def print_alerts(console: Console, alerts: list[Row]) -> None:
    if not alerts:
        console.print("no alerts")
    for alert in alerts:
        style = "red" if alert["severity"] == "critical" else "yellow"
        since = f" since {alert['since']:%Y-%m-%d %H:%M} UTC" if alert["since"] else ""
        console.print(
            Text.assemble((alert["severity"], style), f" {alert['kind']}{since}: ", _foreign(alert["summary"]))
        )
        console.print(Text(f"  {alert['remedy']}"))


def print_status(console: Console, status: Row) -> None:
    title = "medpruner-pacs: what is open, and what ended within the last day"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("studies", _state_counts(status["studies"], held=status["studies_held"]))
    table.add_row("instances", str(status["instances"]))
    table.add_row("analyses", _state_counts(status["analyses"]))
    table.add_row("deliveries", _state_counts(status["deliveries"]))
    oldest = status["oldest_unfinished_s"]
    table.add_row("oldest unfinished", "none" if oldest is None else f"{oldest} s")
    audit = status["audit"]
    behind = f", {audit['waiting']} not yet (the oldest {audit['lag_s']} s)" if audit["waiting"] else ""
    table.add_row("audit chain", f"{audit['chained']} events{behind}")
    console.print(table)
    for one in status["workers"]:
        console.print(f"worker {one['worker']}: {_worker(one)}", markup=False, emoji=False, highlight=False)
    if not status["workers"]:
        console.print("No worker is there: what is received waits. `./run worker` starts one.", markup=False)
    if not status["destinations"]:
        console.print("No [[destination]] is configured: results are kept and sent nowhere.", markup=False)
    for one in status["destinations"]:
        paused = ", paused" if one["paused"] else ""
        console.print(
            f"destination {one['name']}: {one['ae_title']} at {one['address']}, {one['waiting']} waiting{paused}",
            markup=False,
            emoji=False,
        )
    for name, waiting in status["waiting_for_others"].items():
        console.print(
            f'destination {name}: not in the configuration, {waiting} waiting; add [[destination]] name = "{name}"',
            markup=False,
        )


def _worker(one: Row) -> str:
    """On what, with which model, doing what; a silent worker says since when."""
    memory = ""
    if one["memory_bytes"]:
        memory = f", {one['memory_used_bytes'] / 1e9:.1f} of {one['memory_bytes'] / 1e9:.1f} GB used"
    device = (
        f"{one['device_name']} ({one['device']}){memory}" if one["device_name"] else one["device"] or "unknown device"
    )
    model = f"model {one['model']}" if one["model"] else "no model loaded"
    doing = "idle" if one["study_id"] is None else f"reads study {one['study_id']} for {one['running_s']} s"
    if one["silent"]:
        doing = "SILENT" + (f" since {one['seen_at']:%Y-%m-%d %H:%M:%S} UTC" if one["seen_at"] else "") + f", {doing}"
    return f"{device}, {model}, {doing}"


def print_findings(console: Console, findings: list[Row]) -> None:
    """What `doctor` found, one row a check; what would help stands beside what is not well."""
    table = Table(header_style="bold")
    for heading in ("checked", "", "found", "what would help"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "fault": "red", "unknown": "bright_black"}
    for one in findings:
        state = one["state"].value
        marked = Text(state, style=colours[state])
        table.add_row(_foreign(one["subject"]), marked, _foreign(one["result"]), _foreign(one["remedy"]))
    console.print(table)
    count = sum(one["state"].value == "fault" for one in findings)
    console.print(f"{count} faults" if count else "nothing is broken")


def print_history(console: Console, rows: list[Row]) -> None:
    table = Table(header_style="bold")
    for heading in (
        "#",
        "received",
        "from",
        "accession",
        "images",
        "rev",
        "study",
        "analysis",
        "slices",
        "tokens",
        "results",
    ):
        table.add_column(heading, overflow="fold")
    for row in rows:
        counts = row["counts"] or {}
        table.add_row(
            str(row["study_id"]),
            _clock(row["received_at"]),
            _foreign(row["from"]),
            _foreign(row["accession_number"] or ""),
            str(row["instances"]),
            str(row["revision"]),
            _state(row["study_state"] + (" (held)" if row["held"] else "")),
            _state(row["analysis_state"]),
            _kept(counts.get("inputs_kept"), counts.get("inputs")),
            _kept(counts.get("tokens_kept"), counts.get("tokens_in")),
            _state_counts({state: n for state, n in row["deliveries"].items() if n}),
        )
    console.print(table)
    if not rows:
        console.print("No study fits. `./run echo` tests the receiver, `./run send DIR` sends it a study.")


def print_study(console: Console, story: Row) -> None:
    study, header = story["study"], story["header"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Study Instance UID", _foreign(study["study_uid"]))
    facts.add_row("state", _state(study["state"]), "revision", str(study["revision"]))
    if study["held"]:
        facts.add_row("held", "rebuilt from the spool; `requeue` releases it")
    if study["patient_mismatch"]:
        facts.add_row("[red]patients mixed[/]", "conflicting patient identifiers arrived under this UID")
    if header is None:
        facts.add_row("patient", "not on record")
    else:
        facts.add_row("patient", _foreign(f"{header['patient_name']} ({header['patient_id']})"))
        facts.add_row("accession number", _foreign(header["accession_number"]))
        facts.add_row("study", _foreign(f"{header['study_date']} {header['study_description']}"))
    for series in story["series"]:
        facts.add_row(
            "series",
            _foreign(f"{series['modality']}, {series['instances']} instances, {series['size_bytes'] / 1e6:.1f} MB"),
            "",
            _foreign(series["series_uid"]),
        )
    console.print(Panel(facts, title=f"study {study['id']}", title_align="left"))
    for analysis in story["analyses"]:
        console.print(_analysis(analysis))
    console.print(_timeline(story["events"]))


def _analysis(analysis: Row) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("state", _state(analysis["state"]))
    if analysis["reason"]:
        facts.add_row("reason", _foreign(f"{analysis['reason']} [{analysis['reason_code']}]"))
    facts.add_row("attempts", str(analysis["attempts"]))
    if analysis["series_uid"]:
        facts.add_row("series", _foreign(analysis["series_uid"]))
        facts.add_row("why this one", _foreign(analysis["series_reason"] or ""))
    if analysis["counts"]:
        facts.add_row("slices", _funnel(analysis["counts"], SLICE_STEPS))
        facts.add_row("tokens", _funnel(analysis["counts"], TOKEN_STEPS))
    facts.add_row("pruning", _foreign(_pairs(analysis["pruning"] or analysis["settings"]["pruning"])))
    if analysis["model"]:
        model = analysis["model"]
        facts.add_row(
            "model",
            _foreign(f"{model['name']} ({model['architecture']}, {model['dtype']} on {model['device']})"),
        )
        facts.add_row("weights", f"sha256 {model['weights_sha256']}")
        facts.add_row("software", f"torch {model['torch_version']}, transformers {model['transformers_version']}")
    if analysis["flags"]:
        facts.add_row("flags", _foreign(", ".join(analysis["flags"])))
    if analysis["timings_s"]:
        facts.add_row("time", ", ".join(f"{step} {seconds:.2f} s" for step, seconds in analysis["timings_s"].items()))
    facts.add_row("prompt", _foreign(analysis["prompt"]))
    parts: list[RenderableType] = [facts]
    if analysis["report"]:
        parts += [Text("Findings", style="bold"), _foreign(analysis["report"]["findings"])]
        parts += [Text("Impression", style="bold"), _foreign(analysis["report"]["impression"])]
    for result in analysis["results"]:
        parts.append(
            Text.from_markup(f"result {result['kind']} {_state(result['state'])} {result['sop_instance_uid']}")
        )
        for delivery in result["deliveries"]:
            status = "" if delivery["status"] is None else f" 0x{delivery['status']:04X}"
            reason = f": {delivery['reason']}" if delivery["reason"] else ""
            line = Text.from_markup(
                f"  to {delivery['destination']}: {_state(delivery['state'])}{status}, {delivery['attempts']} attempts"
            )
            parts.append(line.append_text(_foreign(reason)))
    identity = f"route {analysis['route']}, revision {analysis['revision']}, run {analysis['run_number']}"
    title = f"analysis {analysis['id']}: {identity}"
    return Panel(Group(*parts), title=title, title_align="left")


def _timeline(events: list[Row]) -> Table:
    table = Table(title="what happened", title_justify="left", header_style="bold")
    for heading in ("at (UTC)", "event", "by", "detail"):
        table.add_column(heading, overflow="fold")
    for event in events:
        table.add_row(_clock(event["at"]), event["kind"], _foreign(event["actor"]), _foreign(_pairs(event["detail"])))
    return table


HISTORY_COLUMNS = (
    "study_id",
    "study_uid",
    "accession_number",
    "patient_id",
    "received_at",
    "from",
    "instances",
    "revision",
    "study_state",
    "held",
    "route",
    "analysis_state",
    "reason",
    "counts",
    "deliveries",
)
SPREADS = {
    "waited_s": "s waited for a worker",
    "read_s": "s read",
    "complete_to_delivered_s": "s from complete to delivered",
    "inputs_kept": "share of inputs kept",
    "tokens_kept": "share of tokens kept",
}
SLICE_STEPS = {
    "slices_in_series": "in the series",
    "slices_readable": "readable",
    "slices_sampled": "sampled",
    "inputs": "model inputs",
    "inputs_kept": "kept",
}
TOKEN_STEPS = {
    "tokens_in": "in",
    "tokens_kept": "kept",
    "tokens_merged": "merged",
    "tokens_generated": "written",
}


def _funnel(counts: Row, steps: dict[str, str]) -> str:
    return ", ".join(f"{counts[key]} {words}" for key, words in steps.items())


def _spread(spread: Row) -> str:
    return f"median {spread['median']:g}, 95 % within {spread['p95']:g}, at most {spread['max']:g} ({spread['n']})"


def _cell(value: Any) -> Any:
    """A cell of CSV; text that a spreadsheet would run as a formula is quoted by an apostrophe."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    text = value.isoformat() if isinstance(value, datetime) else value
    return f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@") else text


def _pairs(values: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _kept(kept: int | None, total: int | None) -> str:
    return "" if kept is None or total is None else f"{kept}/{total}"


def _state_counts(counts: Row, held: int | None = None) -> str:
    shown = [f"{number} {_state(state)}" for state, number in counts.items() if number]
    if held:
        shown.append(f"{held} held")
    return ", ".join(shown) or "none"


def _state(state: str | None) -> str:
    if not state:
        return ""
    colour = COLOURS.get(state.split(" ")[0])
    return f"[{colour}]{state}[/]" if colour else state


def _foreign(text: str) -> Text:
    """What somebody else wrote, as it is: neither markup nor emoji codes, and nothing that steers a terminal."""
    return Text("".join("\N{REPLACEMENT CHARACTER}" if _steers(character) else character for character in text))


def _steers(character: str) -> bool:
    """Control characters (an escape sequence can do anything) and those that turn the direction of writing."""
    if unicodedata.category(character) == "Cc":
        return character not in "\n\t"
    return character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _clock(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, StrEnum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")
