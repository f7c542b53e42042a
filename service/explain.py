"""Why a study stands where it stands, and what happens next: sentences for people, made of rows. Knows no database."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from service.shared.settings import Settings

Row = dict[str, Any]


def explain(story: Row, settings: Settings, now: datetime) -> list[str]:
    """The sentences, in the order of the way; story: what history.study_story gives. They name no patient."""
    study, analyses = story["study"], story["analyses"]
    sentences = [*_arrived(story), *_completeness(study, settings, now)]
    if study["patient_mismatch"]:
        sentences.append(
            "Instances under this Study Instance UID name different patients, so it is never analysed. "
            "Next: correct the study at its source and send it again."
        )
    if study["held"]:
        sentences.append(
            "It was rebuilt from the spool and is held: nothing runs or is sent. Next: `requeue` releases it."
        )
    if not analyses and study["state"] == "complete" and study["revision"] > 0:
        sentences.append(_no_analysis(story))
    for analysis in analyses:
        sentences += _analysis(analysis, settings, now)
    return sentences


def _arrived(story: Row) -> list[str]:
    study = story["study"]
    count = sum(one["instances"] for one in story["series"])
    sentences = [
        f"{count} instances in {len(story['series'])} series; the last images came from {study['calling_ae']}."
    ]
    removed = [event for event in story["events"] if event["kind"] in ("spool-removed", "study-forgotten")]
    if removed:
        sentences.append(f"Its files were removed from here on {_day(removed[-1]['at'])} ({removed[-1]['kind']}).")
    return sentences


def _completeness(study: Row, settings: Settings, now: datetime) -> list[str]:
    if study["revision"] == 0:
        return ["No image of a modality that any route reads has arrived, so nothing is analysed."]
    if study["state"] == "complete":
        return [f"Revision {study['revision']} is complete since {_clock(study['completed_at'])}."]
    periods = {one.ae_title: one.quiet_period_s for one in settings.source if one.quiet_period_s}
    quiet_s = periods.get(study["calling_ae"], settings.assembly.quiet_period_s)
    silent_s = (now - study["last_image_at"]).total_seconds()
    return [
        f"Revision {study['revision']} is receiving: the last image came {silent_s:.0f} s ago. Next: it is complete "
        f"after {quiet_s:g} s without one and without an open association that brought some, and "
        f"{settings.assembly.max_open_s:g} s after its first image in any case."
    ]


def _no_analysis(story: Row) -> str:
    if any(event["kind"] == "study-unrouted" for event in story["events"]):
        return (
            "No route takes it, so nothing is analysed. Next: see [[route]] match; `requeue --again` tries once more."
        )
    return "No analysis is queued yet. Next: dispatch queues one per route within a few seconds."


def _analysis(analysis: Row, settings: Settings, now: datetime) -> list[str]:
    name = f"Analysis {analysis['id']} (route {analysis['route']}, revision {analysis['revision']}"
    name += f", run {analysis['run_number']})"
    sentences = [f"{name} {_state(analysis, settings, now)}"]
    if analysis["series_uid"]:
        sentences.append(f"It read series {analysis['series_uid']}: {analysis['series_reason']}.")
    if analysis["counts"]:
        counts = analysis["counts"]
        method = (analysis["pruning"] or {}).get("method")
        sentences.append(
            f"Pruning ({method}) showed the model {counts['inputs_kept']} of {counts['inputs']} inputs "
            f"and {counts['tokens_kept']} of {counts['tokens_in']} visual tokens."
        )
    for result in analysis["results"]:
        if result["state"] == "quarantined":
            sentences.append(
                f"Result {result['sop_instance_uid']} did not pass the gate and is never sent: "
                f"{'; '.join(result['gate'])}."
            )
        elif not result["deliveries"]:
            sentences.append(
                f"Result {result['sop_instance_uid']} is kept and sent nowhere: its route has no destination."
            )
        sentences += [_delivery(one) for one in result["deliveries"]]
    return sentences


def _state(analysis: Row, settings: Settings, now: datetime) -> str:
    reason = f" ({analysis['reason']} [{analysis['reason_code']}])" if analysis["reason"] else ""
    state = analysis["state"]
    if state == "queued":
        waited_s = (now - analysis["queued_at"]).total_seconds()
        again = f" after {analysis['attempts']} attempts{reason}" if analysis["attempts"] else ""
        return f"waits for a worker since {waited_s:.0f} s{again}. Next: a free worker claims it."
    if state == "running":
        lost = analysis["lease_until"] is not None and analysis["lease_until"] < now
        if lost:
            return f"was running on {analysis['worker']}, whose lease has run out. Next: another worker takes it over."
        return f"is running on {analysis['worker']}, attempt {analysis['attempts']}. Next: its results are built."
    if state == "read":
        quarantined = any(one["state"] == "quarantined" for one in analysis["results"])
        return "was read. " + ("A result did not pass the gate." if quarantined else "Next: its results are built.")
    if state == "done":
        return f"is done since {_clock(analysis['finished_at'])}."
    if state == "refused":
        return (
            f"was refused{reason}. That is an outcome: nothing more happens unless a late image or `requeue --again`."
        )
    if state == "failed":
        most = settings.queue.max_attempts
        return f"failed after {analysis['attempts']} of {most} attempts{reason}. Next: `requeue` tries again."
    if state == "superseded":
        return f"was superseded{reason}. The later revision is analysed instead."
    return f"is {state}{reason}. `requeue --again` queues another run."


def _delivery(delivery: Row) -> str:
    where, why = f"Its delivery to {delivery['destination']}", f": {delivery['reason']}" if delivery["reason"] else ""
    if delivery["state"] == "pending":
        tried = f" after {delivery['attempts']} attempts{why}" if delivery["attempts"] else ""
        return f"{where} waits{tried}. Next: the stored bytes are sent at {_clock(delivery['next_attempt_at'])}."
    if delivery["state"] == "rejected":
        return f"{where} was rejected{why}. Next: `requeue` sends the stored bytes again."
    return f"{where} is {delivery['state']} since {_clock(delivery['delivered_at'])}{why}."


def _clock(at: datetime | None) -> str:
    return "an unknown time" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _day(at: datetime) -> str:
    return f"{at:%Y-%m-%d}"
