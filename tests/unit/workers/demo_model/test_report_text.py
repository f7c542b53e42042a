"""Reports say what the labels say, in every phrasing, and can be read back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.demo_model.anatomy import Side, Zone
from workers.demo_model.findings import Extent, NoduleKind
from workers.demo_model.labels import (
    ConsolidationLabel,
    EffusionLabel,
    Labels,
    NoduleLabel,
    PneumothoraxLabel,
)
from workers.demo_model.report_text import PHRASINGS, read, write

SIDES, ZONES, EXTENTS = st.sampled_from(Side), st.sampled_from(Zone), st.sampled_from(Extent)
NODULES = st.builds(NoduleLabel, SIDES, ZONES, st.sampled_from(NoduleKind), st.integers(4, 30))
BOTH = st.sampled_from([(Side.RIGHT,), (Side.LEFT,), tuple(Side)])
LABELS = st.builds(
    Labels,
    nodules=st.lists(NODULES, max_size=2).map(tuple),
    effusion=st.none() | st.builds(EffusionLabel, BOTH, EXTENTS),
    consolidation=st.none() | st.builds(ConsolidationLabel, SIDES, ZONES),
    pneumothorax=st.none() | st.builds(PneumothoraxLabel, SIDES, EXTENTS),
    cardiomegaly=st.booleans(),
    calcification=st.booleans(),
)


@given(LABELS, st.integers(0, PHRASINGS - 1))
@settings(deadline=None)
def test_what_is_written_is_read_back(labels: Labels, phrasing: int) -> None:
    """No label is lost or made up on the way through the text."""
    assert read(str(write(labels, phrasing))) == labels


@given(LABELS, st.integers(0, PHRASINGS - 1))
@settings(deadline=None)
def test_impression_names_the_positives_alone(labels: Labels, phrasing: int) -> None:
    """The impression says what is there; only a normal study says that nothing is."""
    impression = write(labels, phrasing).impression

    assert labels.normal == impression.lower().startswith(("no ", "normal"))


def test_unsupported_body_is_said_plainly() -> None:
    """No finding is named, present or absent."""
    text = str(write(Labels(supported=False)))

    assert "Body region not supported" in text
    assert "nodule" not in text
    assert read(text) == Labels(supported=False)


def test_noise_reads_as_no_finding() -> None:
    """Text without any known sentence states nothing."""
    assert read("Findings: lorem ipsum. Impression: dolor.") == Labels()
