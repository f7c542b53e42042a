"""One log line per event, text or JSON, with what could name a patient scrubbed out.

Exceptions of pydicom, pynetdicom and Celery quote values, so an exception is logged by its class and the places it
came through, never by its text; also one that ends a thread or the process.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any

import structlog

from service.shared.settings import LogSettings

# Their warnings quote data sets; what matters of theirs is logged by us, in our words. OpenJPEG tells of every frame.
QUIET_LOGGERS = (
    "pynetdicom",
    "pydicom",
    "highdicom",
    "py.warnings",
    "PIL",
    "urllib3",
    "transformers",
    "alembic",
    "openjpeg",
)


def set_up_logging(settings: LogSettings, *, role: str) -> None:
    """Send every logger of the process to stderr in one shape; called once, by the entry point."""

    def add_role(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        event.setdefault("role", role)  # a context variable would not reach threads
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        add_role,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _scrub_exception,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=False, pad_event_to=24)
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(settings.level),  # what is not shown costs nothing
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _scrub_foreign],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    handler.addFilter(_is_fit)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level)
    logging.captureWarnings(True)
    sys.excepthook = _log_unhandled
    threading.excepthook = _log_unhandled_in_thread


def explain_exception(error: BaseException) -> str:
    """The class of `error` and the last places it came through; never its text, which may quote a data set."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{frame.name} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})" for frame in frames[::-1])
    return f"{type(error).__name__} in {places}" if places else type(error).__name__


def _is_fit(record: logging.LogRecord) -> bool:
    """On the handler, not as levels of the loggers: pydicom sets the level of its own when it is imported."""
    return record.levelno >= logging.ERROR or not any(
        record.name == name or record.name.startswith(f"{name}.") for name in QUIET_LOGGERS
    )


def _log_unhandled(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, Exception):  # Ctrl-C
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger(__name__).critical("unhandled_exception", error=explain_exception(error))


def _log_unhandled_in_thread(ended: threading.ExceptHookArgs) -> None:
    if isinstance(ended.exc_value, Exception):
        name = ended.thread.name if ended.thread else None
        structlog.get_logger(__name__).critical(
            "unhandled_exception", thread=name, error=explain_exception(ended.exc_value)
        )


def _scrub_exception(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    information = event.pop("exc_info", None)
    if information is True:
        information = sys.exc_info()
    error = information[1] if isinstance(information, tuple) else information
    if isinstance(error, BaseException):
        event["error"] = explain_exception(error)
    return event


def _scrub_foreign(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Lines of other libraries at ERROR and above keep their logger's name and level, not their text."""
    record: logging.LogRecord | None = event.get("_record")
    if record is not None and record.levelno >= logging.ERROR and not record.name.startswith(("service", "workers")):
        event["event"] = f"{record.name} reported {record.levelname.lower()}"
        event["place"] = f"{record.funcName} ({record.filename}:{record.lineno})"
    return event
