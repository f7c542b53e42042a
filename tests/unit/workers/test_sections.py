"""Text of a model -> sections: refusals, loops and lengths; nothing is invented."""

from __future__ import annotations

import pytest

from service.shared.messages import Flag
from workers.sections import LONGEST_TEXT, parse


@pytest.mark.parametrize(
    "text",
    [
        "Findings: The lungs are clear.\nImpression: Normal.",
        "**FINDINGS:** The lungs are clear.\n\n**Impression:** Normal.",
        "# Findings:\nThe lungs are clear.\n# Conclusion:\nNormal.",
    ],
)
def test_sections_are_recognised_however_they_are_marked(text: str) -> None:
    """Without their headings and marks."""
    read = parse(text)

    assert (read.findings, read.impression, read.flags) == ("The lungs are clear.", "Normal.", ())


def test_text_without_headings_stands_whole_under_findings() -> None:
    """And is flagged; no impression is made up."""
    read = parse("The lungs are clear.")

    assert (read.findings, read.impression, read.flags) == ("The lungs are clear.", "", (Flag.UNPARSED,))


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't interpret medical images.",
        "I am unable to provide a report. Please consult a radiologist.",
        "As an AI, I do not read scans.",
        "I cannot analyze this image.",
    ],
)
def test_refusal_of_the_model_is_flagged_and_its_words_are_kept(text: str) -> None:
    """A refusal that passes for a report would be read as a normal finding."""
    read = parse(text)

    assert Flag.REFUSED in read.flags
    assert read.findings == text


@pytest.mark.parametrize("text", ["The patient is unable to hold breath.", "No lesion can be given a name."])
def test_report_that_speaks_of_inability_is_no_refusal(text: str) -> None:
    """Only the model's own."""
    assert Flag.REFUSED not in parse(text).flags


@pytest.mark.parametrize("phrase", ["There is a nodule in the right lung. ", "no ", "Nodule 4 mm.\n"])
def test_runaway_repetition_is_cut_after_its_first_round(phrase: str) -> None:
    """Short and long phrases."""
    read = parse("Findings: Clear.\nImpression: Normal. " + phrase * 200)

    assert Flag.REPETITION in read.flags
    assert len(read.impression) < 100
    assert read.impression.startswith("Normal.")


def test_phrase_said_twice_is_no_loop() -> None:
    """Both lungs may be described in the same words."""
    text = "Findings: The lung is clear without nodule. The lung is clear without nodule.\nImpression: Normal."

    assert parse(text).flags == ()


def test_length_is_bounded_and_the_cut_is_said() -> None:
    """Text without end that never repeats itself."""
    endless = "Findings: " + " ".join(str(number) for number in range(20_000))

    read = parse(endless)

    assert len(read.findings) <= LONGEST_TEXT
    assert Flag.TRUNCATED in read.flags
    assert Flag.REPETITION not in read.flags


@pytest.mark.parametrize(
    "thought",
    [
        "<unused94>thought\nFindings: perhaps a mass.<unused95>",
        "<think>Impression: a mass?</think>\n\n",
        "A mass?</think>",
    ],
)
def test_thought_before_the_answer_is_no_part_of_the_report(thought: str) -> None:
    """MedGemma 1.5 and thinking variants of Qwen3-VL write one; its headings are not the report's."""
    read = parse(f"{thought}Findings: Clear.\nImpression: Normal.")

    assert (read.findings, read.impression, read.flags) == ("Clear.", "Normal.", ())


def test_text_that_ends_within_a_thought_says_nothing() -> None:
    """Half a thought must not pass for a finding."""
    read = parse("<unused94>thought\nThere may be a mass in the")

    assert (read.findings, read.impression, read.flags) == ("", "", (Flag.UNPARSED,))
