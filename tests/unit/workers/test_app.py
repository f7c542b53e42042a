"""The Celery application: what it promises about messages, limits and the parent process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.shared.queue import TASK_READ_STUDY
from service.shared.settings import Settings
from workers.app import build_app

PROJECT = Path(__file__).parents[3]


def test_message_is_gone_only_when_its_task_is_over() -> None:
    """A killed child gives it back, a waiting one is for whoever is free, and one child holds the one model."""
    conf = build_app(Settings()).conf

    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert (conf.worker_prefetch_multiplier, conf.worker_concurrency, conf.worker_pool) == (1, 1, "prefork")
    assert list(conf.accept_content) == ["json"]
    assert conf.task_ignore_result


def test_task_is_known_by_the_name_that_the_service_sends() -> None:
    """The service never imports it."""
    assert TASK_READ_STUDY in build_app(Settings()).tasks


@pytest.mark.parametrize(("hard", "soft"), [(1800, 1770), (120, 90), (60, 45), (20, 15), (1, 1)])
def test_task_is_told_to_end_shortly_before_it_is_killed(hard: int, soft: int) -> None:
    """Also under a short limit it has most of its time."""
    settings = Settings.model_validate({"queue": {"hard_time_limit_s": hard}})

    conf = build_app(settings).conf
    assert (conf.task_soft_time_limit, conf.task_time_limit) == (soft, hard)


def test_visibility_timeout_survives_the_workers_own_options() -> None:
    """Redis must not hand running work to a second worker."""
    settings = Settings.model_validate({"queue": {"visibility_timeout_s": 5000}})

    assert build_app(settings).conf.broker_transport_options["visibility_timeout"] == 5000


def test_parent_imports_neither_torch_nor_what_needs_it() -> None:
    """It forks: CUDA would be unusable in the child, and the weights' memory would be held twice."""
    code = (
        "import sys; from workers.app import build_app; from service.shared.settings import Settings; "
        "build_app(Settings()); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)

    assert not {"torch", "transformers", "pydicom", "scipy"} & set(loaded.stdout.split())
