"""The Celery worker: one child that holds the model. The parent never imports torch.

What a message may do is decided by the database (tasks.py); Celery brings the message and restarts the child.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown
from sqlalchemy.orm import Session, sessionmaker

from service.shared import lifeline
from service.shared.db import open_engine, open_sessions
from service.shared.log import explain_exception, set_up_logging
from service.shared.queue import TASK_READ_STUDY, celery_options
from service.shared.settings import ModelSettings, Settings, database_url
from workers.presence import presence_kept

if TYPE_CHECKING:
    from workers.vlm import VisionLanguageModel

SOFT_LIMIT_MARGIN_S = 30

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Child:
    """What one worker child holds between tasks."""

    settings: Settings
    sessions: sessionmaker[Session]
    name: str
    model_settings: ModelSettings | None = None
    model: VisionLanguageModel | None = None
    presence: ExitStack = field(default_factory=ExitStack)

    def model_for(self, wanted: ModelSettings) -> VisionLanguageModel:
        """The loaded model, or the one a route asks for instead; one is held at a time.

        The length of a report and what is asked after it are settings of the request, not of the weights, and load
        nothing again.
        """
        from workers.vlm import open_model  # torch: in the child only

        wanted = wanted.model_copy(update={"max_new_tokens": 1, "coded_findings": None})
        if self.model is None or self.model_settings != wanted:
            self.model = None  # free the old one first
            self.model = open_model(wanted)
            self.model_settings = wanted
            identity = self.model.identity
            log.info("model_loaded", model=identity.name, device=identity.device, weights=identity.weights_sha256)
        return self.model


def build_app(settings: Settings) -> Celery:
    """The configured Celery application with its one task."""
    app = Celery("medpruner")
    app.conf.update(celery_options(settings))
    app.conf.update(
        task_acks_late=True,  # a message is gone only when its task is over
        task_reject_on_worker_lost=True,  # a killed child gives its message back; the database counts attempts
        worker_prefetch_multiplier=1,  # a waiting message is for whichever worker is free
        worker_concurrency=1,  # one model, one GPU
        worker_pool="prefork",  # the only pool that enforces time limits and survives a killed child
        worker_proc_alive_timeout=600,  # loading weights takes longer than the 4 s Celery allows by default
        task_time_limit=settings.queue.hard_time_limit_s,
        task_soft_time_limit=_soft_limit_s(settings.queue.hard_time_limit_s),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # wait for Redis for as long as it takes
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the database lease decides, not the broker
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    # A redelivery must not wait for Redis' default sweep of 100 s when a whole worker was killed.
    app.conf.broker_transport_options |= {"unacked_restore_interval": 5, "unacked_restore_throttle": 1}

    @app.task(name=TASK_READ_STUDY, shared=False)  # of this application only
    def read_study(analysis_id: int) -> None:
        from workers.tasks import read_study as run  # pydicom, numpy and torch: in the child only

        run(analysis_id, _child_of(settings))

    @worker_process_init.connect(weak=False)
    def load_model(**_: Any) -> None:
        set_up_logging(settings.log, role="worker")
        child = _child_of(settings)
        child.presence.enter_context(lifeline.held(settings.data.path, child.name))
        child.presence.enter_context(presence_kept(child))
        try:
            child.model_for(settings.model)
        except Exception as error:  # noqa: BLE001  # each task tries again and puts the reason on record
            log.error("model_not_loaded", path=settings.model.path, error=explain_exception(error))

    @worker_process_shutdown.connect(weak=False)
    def leave(**_: Any) -> None:
        _child_of(settings).presence.close()

    return app


def _soft_limit_s(hard_limit_s: int) -> int:
    """When a task is told to end, so that it can say why before it is killed; late also under a short limit."""
    return hard_limit_s - min(SOFT_LIMIT_MARGIN_S, hard_limit_s // 4)


def run_worker(settings: Settings) -> None:
    """Serve the queue in the foreground until SIGTERM, which lets the running task finish."""
    arguments = ["--quiet", "worker", "--loglevel", settings.log.level, "--queues", settings.queue.name]
    arguments += ["--hostname", f"medpruner-{os.getpid()}@%h", "--without-gossip", "--without-mingle"]
    build_app(settings).worker_main(arguments)


_children: dict[int, Child] = {}  # by process id: a forked copy of the parent's entry must not be used


def _child_of(settings: Settings) -> Child:
    process = os.getpid()
    if process not in _children:
        _children.clear()
        sessions = open_sessions(open_engine(database_url(settings)))
        _children[process] = Child(settings, sessions, f"{socket.gethostname()}/{process}")
    return _children[process]
