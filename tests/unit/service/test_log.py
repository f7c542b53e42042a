"""Log lines: what names a patient never reaches one, whichever library, thread or fault would bring it there.

Each test logs in a process of its own, because set_up_logging is for a whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.shared.db import Base, StudyHeader, open_engine, open_sessions
from service.shared.log import explain_exception

PLANTED = "Planted^Patient"
PROJECT = Path(__file__).parents[3]


def said_by(code: str, *, form: str = "json", level: str = "INFO", role: str = "test") -> str:
    """Everything that a process writes which sets its logs up and then runs `code`."""
    program = (
        "import logging, sys, structlog\n"
        "from service.shared.log import set_up_logging\n"
        "from service.shared.settings import LogSettings\n"
        f"PLANTED = {PLANTED!r}\n"
        f"set_up_logging(LogSettings(format={form!r}, level={level!r}), role={role!r})\n"
        "log = structlog.get_logger('service.tested')\n" + code
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT, check=False)
    return done.stdout + done.stderr


def lines_of(code: str, **how: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said_by(code, **how).splitlines()]


RAISE = f"raise ValueError('value {PLANTED} is not valid for VR DA')"


def test_line_has_its_event_level_time_role_and_fields() -> None:
    """One JSON object per line."""
    (line,) = lines_of("log.info('study_complete', study_id=4)")

    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "study_complete", "level": "info", "role": "test", "study_id": 4}


def test_text_lines_hold_the_same() -> None:
    """For people: one line, no colours, keys with values."""
    (line,) = said_by("log.warning('study_complete', study_id=4)", form="text").splitlines()

    assert "warning" in line
    assert "study_complete" in line
    assert "study_id=4" in line
    assert "\x1b" not in line


def test_lines_below_the_level_are_left_out() -> None:
    """[log] level."""
    assert lines_of("log.info('one'); log.warning('two')", level="WARNING")[0]["event"] == "two"


@pytest.mark.parametrize("form", ["json", "text"])
def test_logged_exception_keeps_its_class_and_place_and_loses_its_text(form: str) -> None:
    """The text quotes the value that broke the rule."""
    said = said_by(f"try:\n    {RAISE}\nexcept ValueError:\n    log.exception('header_unreadable')", form=form)

    assert "header_unreadable" in said
    assert "ValueError in <module>" in said
    assert PLANTED not in said


def test_exception_given_as_a_value_is_treated_alike() -> None:
    """exc_info may be True, a triple or the exception itself."""
    code = f"""
try:
    {RAISE}
except ValueError as error:
    log.error('one', exc_info=error)
    log.error('two', exc_info=sys.exc_info())
    logging.getLogger('celery.app.trace').error('three', exc_info=True)
"""
    lines = lines_of(code)

    assert [line["error"].split(" ")[0] for line in lines] == ["ValueError"] * 3
    assert PLANTED not in str(lines)


@pytest.mark.parametrize("name", ["celery.app.trace", "pydicom", "pynetdicom.dimse", "sqlalchemy.engine", "kombu"])
def test_error_of_another_library_keeps_its_name_and_not_its_text(name: str) -> None:
    """Celery logs the representation of an exception, pydicom the value."""
    (line,) = lines_of(f"logging.getLogger({name!r}).error('bad value %r', PLANTED)")

    assert line["event"] == f"{name} reported error"
    assert PLANTED not in str(line)


@pytest.mark.parametrize("name", ["pydicom", "pynetdicom.dimse", "highdicom"])
def test_warnings_of_the_dicom_libraries_are_left_out(name: str) -> None:
    """They quote data sets; what matters of them is logged by us."""
    assert said_by(f"logging.getLogger({name!r}).warning('bad value %r', PLANTED)") == ""


def test_a_map_that_is_compressed_writes_no_line() -> None:
    """OpenJPEG tells of every frame."""
    code = (
        "import numpy\n"
        "from openjpeg.utils import encode_array\n"
        "encode_array(numpy.zeros((64, 64, 3), numpy.uint8), photometric_interpretation=1)"
    )
    assert said_by(code) == ""


def test_warning_through_the_warnings_module_is_left_out() -> None:
    """pydicom warns of a bad value with the value, and Python would print that on standard error."""
    code = """
import io, pydicom
from pydicom.dataset import Dataset
dataset = Dataset()
dataset.PatientBirthDate = PLANTED
dataset.PatientBirthDate
import warnings
warnings.warn('value ' + PLANTED)
log.info('after')
"""
    said = said_by(code)

    assert "after" in said
    assert PLANTED not in said


def test_unhandled_exception_of_the_process_is_one_scrubbed_line() -> None:
    """A role that dies says so in the log, not with a traceback that ends in the value."""
    (line,) = lines_of(RAISE)

    assert line["event"] == "unhandled_exception"
    assert line["level"] == "critical"
    assert line["error"].startswith("ValueError in <module>")
    assert PLANTED not in str(line)


def test_unhandled_exception_of_a_thread_is_one_scrubbed_line() -> None:
    """Also where nobody waits for the thread."""
    code = f"""
import threading
def work():
    {RAISE}
thread = threading.Thread(target=work, name='lease')
thread.start()
thread.join()
"""
    (line,) = lines_of(code)

    assert (line["event"], line["thread"]) == ("unhandled_exception", "lease")
    assert line["error"].startswith("ValueError in work")
    assert PLANTED not in str(line)


def test_interrupt_is_no_fault() -> None:
    """Ctrl-C ends a command as everywhere, without a critical line."""
    assert "unhandled_exception" not in said_by("raise KeyboardInterrupt")


def test_explained_exception_names_the_last_places_first() -> None:
    """At most four, each with file and line, and the class of the exception; nothing of its text."""

    def inner() -> None:
        raise KeyError(PLANTED)

    try:
        inner()
    except KeyError as error:
        explained = explain_exception(error)

    assert explained.startswith("KeyError in inner (test_log.py:")
    assert " < test_explained_exception" in explained
    assert PLANTED not in explained


def test_explained_exception_without_a_traceback_is_its_class() -> None:
    """One that was never raised has no place."""
    assert explain_exception(ValueError(PLANTED)) == "ValueError"


def test_exception_of_the_database_hides_its_parameters(sqlite_url: str) -> None:
    """SQLAlchemy would put patient attributes into the text; a second line of defence behind the scrubber."""
    engine = open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    fields = {column.key: PLANTED for column in StudyHeader.__mapper__.column_attrs} | {"study_id": 1}

    with pytest.raises(Exception, match="FOREIGN KEY") as caught, open_sessions(engine).begin() as session:
        session.add(StudyHeader(**fields))
    engine.dispose()

    assert PLANTED not in str(caught.value)


def test_logs_of_this_process_stay_untouched() -> None:
    """The tests above must not have set up logging here: captured logs of other tests rely on it."""
    with structlog.testing.capture_logs() as captured:
        structlog.get_logger("test").info("seen")

    assert captured == [{"event": "seen", "log_level": "info"}]
