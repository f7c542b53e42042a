"""Headers of a study -> the one series to read, with a reason for every series. Decides by headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from service.shared.messages import SeriesCandidate
from service.shared.settings import SeriesSettings
from workers.errors import Refusal, RefusalCode
from workers.headers import InstanceHeader, read_headers
from workers.stack import Stack, arrange, gaps, require_complete, spacing_mm

__all__ = ["Choice", "choose", "read_headers"]

AXIAL_WITHIN_DEG = 20.0
SAME_COVERAGE = 0.9  # of the largest; reconstructions of one acquisition differ by a few slices at the ends

# Kernels that sharpen edges and noise (bone, lung, high resolution), as the vendors name them.
_SHARP = re.compile(
    r"LUNG|BONE|EDGE|SHARP|ULTRA|CHST|HIGH|HR\b"
    r"|^[A-Z][A-Z]?[5-9]\d"  # Siemens B50f, Br64, I70f: from 50 on
    r"|^FC(3\d|5\d|8\d)"  # Canon: inner ear and bone, lung, high resolution
    r"|^(Y[A-E]|D|E|L)$"  # Philips
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The series to read, why, and what became of every other series of the study."""

    series_uid: str
    modality: str
    reason: str
    candidates: tuple[SeriesCandidate, ...]
    scanner: str = ""
    protocol: str = ""


@dataclass(frozen=True, slots=True)
class _Fit:
    """A series that could be read, with what the preferences compare."""

    uid: str
    label: str
    modality: str
    stack: Stack

    @property
    def slices(self) -> int:
        return len(self.stack.slices)

    @property
    def coverage_mm(self) -> float:
        positions = self.stack.positions_mm
        return float(positions[-1] - positions[0])

    @property
    def spacing_mm(self) -> float:
        return spacing_mm(self.stack.positions_mm)


def choose(headers: Sequence[InstanceHeader], settings: SeriesSettings) -> Choice:
    """Return the series to read; raise Refusal with the reason of every series where none fits.

    A series fits when its modality is one of series.modality, it holds original images (no localizers, dose sheets,
    screen captures or derived images) that make one stack within 20 degrees of axial (or of any orientation where
    settings say so), of at least series.min_slices slices and without a gap above series.max_gap_mm.
    Among several, in this order: the modality named first, the largest coverage (within a tenth), no missing slices,
    uncompressed or losslessly compressed, a soft or standard kernel, more slices up to series.max_slices, and beyond
    that the thickest slices, because sampling then skips least; at last the smallest series UID.
    """
    series: dict[str, list[InstanceHeader]] = {}
    for header in headers:
        series.setdefault(header.series_uid, []).append(header)
    fits: list[_Fit] = []
    reasons: dict[str, str] = {}
    for uid, members in sorted(series.items()):
        try:
            fits.append(_fit(uid, members, settings))
        except Refusal as refusal:
            reasons[uid] = refusal.reason
    if not fits:
        raise Refusal(RefusalCode.NO_SUITABLE_SERIES, _none_fits(series, reasons))
    chosen, beaten = _prefer(fits, settings)
    reasons |= beaten
    reasons[chosen.uid] = _why(chosen, fits, beaten)
    return Choice(
        chosen.uid,
        chosen.modality,
        reasons[chosen.uid],
        tuple(_candidate(uid, series[uid], reasons[uid], uid == chosen.uid) for uid in sorted(series)),
        scanner=next((one.scanner for one in series[chosen.uid] if one.scanner), ""),
        protocol=next((one.protocol for one in series[chosen.uid] if one.protocol), ""),
    )


def _fit(uid: str, members: Sequence[InstanceHeader], settings: SeriesSettings) -> _Fit:
    """Judge one series by itself; raise Refusal with the reason for which it cannot be read."""
    modality = _modality(members)
    if not any(header.readable for header in members):
        raise Refusal(RefusalCode.NO_SUITABLE_SERIES, "not readable as DICOM")
    if modality not in settings.modality:
        read = ", ".join(settings.modality)
        raise Refusal(RefusalCode.NO_SUITABLE_SERIES, f"modality {modality} is not read (series.modality: {read})")
    stack = arrange(members)
    if settings.orientation == "axial" and stack.off_axial_deg > AXIAL_WITHIN_DEG:
        plane = ("sagittal", "coronal", "oblique")[int(np.argmax(np.abs(stack.normal)))]
        raise Refusal(RefusalCode.NO_SUITABLE_SERIES, f"{plane}, {stack.off_axial_deg:.0f} degrees off the axial plane")
    require_complete(stack.positions_mm, settings)
    return _Fit(uid, _label(members), modality, stack)


def _prefer(fits: Sequence[_Fit], settings: SeriesSettings) -> tuple[_Fit, dict[str, str]]:
    """Eliminate by one preference after the other; return who is left and why each other one lost."""
    remaining = list(fits)
    lost: dict[str, str] = {}
    for keeps, reason in _preferences(settings):
        kept = [fit for fit in remaining if keeps(fit, remaining)]
        if kept and len(kept) < len(remaining):
            lost |= {fit.uid: f"fits, but {reason(fit)}" for fit in remaining if fit not in kept}
            remaining = kept
    return remaining[0], lost


_Preference = tuple[Callable[[_Fit, Sequence[_Fit]], bool], Callable[[_Fit], str]]


def _preferences(settings: SeriesSettings) -> tuple[_Preference, ...]:
    """In their order: whether a series stays beside the remaining ones, and what to say of it if not."""

    def rank(fit: _Fit) -> int:
        return settings.modality.index(fit.modality)

    def shown(fit: _Fit) -> int:
        return min(fit.slices, settings.max_slices)

    return (
        (
            lambda fit, remaining: rank(fit) == min(map(rank, remaining)),
            lambda fit: f"is {fit.modality}",
        ),
        (
            lambda fit, remaining: fit.coverage_mm >= SAME_COVERAGE * max(other.coverage_mm for other in remaining),
            lambda fit: f"covers only {fit.coverage_mm:.0f} mm",
        ),
        (lambda fit, _: not gaps(fit.stack.positions_mm), lambda fit: "slices are missing in it"),
        (lambda fit, _: not _has_losses(fit), lambda fit: "is compressed with loss"),
        (lambda fit, _: not _is_sharp(fit), lambda fit: "has a sharp kernel (bone or lung)"),
        (
            lambda fit, remaining: shown(fit) == max(map(shown, remaining)),
            lambda fit: f"has only {fit.slices} slices",
        ),
        (
            lambda fit, remaining: fit.slices == min(other.slices for other in remaining),
            lambda fit: f"has {fit.slices} thinner slices, of which sampling would skip more",
        ),
        (
            lambda fit, remaining: fit.uid == min(other.uid for other in remaining),
            lambda fit: "equals the chosen one in all that was compared",
        ),
    )


def _has_losses(fit: _Fit) -> bool:
    return fit.stack.reference.compressed_with_loss


def _is_sharp(fit: _Fit) -> bool:
    return bool(_SHARP.search(fit.stack.reference.kernel.upper()))


def _why(chosen: _Fit, fits: Sequence[_Fit], beaten: dict[str, str]) -> str:
    plane = "axial " if chosen.stack.off_axial_deg <= AXIAL_WITHIN_DEG else ""
    what = (
        f"{chosen.slices} original {plane}{chosen.modality} slices, {chosen.spacing_mm:.1f} mm apart,"
        f" over {chosen.coverage_mm:.0f} mm"
    )
    if not beaten:
        return f"{what}; the only series that fits"
    others = [f"{fit.label} ({beaten[fit.uid].removeprefix('fits, but ')})" for fit in fits if fit is not chosen]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{what}; preferred to {', '.join(others[:3])}{more}"


def _none_fits(series: dict[str, list[InstanceHeader]], reasons: dict[str, str]) -> str:
    """Every series with its reason; series with the same reason together."""
    if not series:
        return "the study holds no objects"
    alike: dict[str, list[str]] = {}
    for uid, reason in reasons.items():
        alike.setdefault(reason, []).append(_label(series[uid]))
    return "no series can be read: " + "; ".join(f"{', '.join(who)}: {why}" for why, who in alike.items())


def _candidate(uid: str, members: Sequence[InstanceHeader], reason: str, chosen: bool) -> SeriesCandidate:
    return SeriesCandidate(
        series_uid=uid,
        modality=_modality(members),
        instances=len({header.path for header in members}),
        chosen=chosen,
        reason=reason,
    )


def _modality(members: Sequence[InstanceHeader]) -> str:
    """The most frequent one; a value that is no code string is not repeated, it may hold anything."""
    modality = Counter(header.modality for header in members).most_common(1)[0][0]
    return modality if re.fullmatch(r"[A-Z0-9_]{1,16}", modality) else "unknown"


def _label(members: Sequence[InstanceHeader]) -> str:
    """What a radiologist calls the series; descriptions are left out, they are free text."""
    if not members[0].series_uid:
        return "objects without a series"
    number = members[0].series_number
    return "a series without a number" if number is None else f"series {number}"
