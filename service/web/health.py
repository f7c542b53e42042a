"""Is the service well? Each dependency by itself; for load balancers, watchdogs and the front page."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import redis
from fastapi import APIRouter, Response
from pydantic import BaseModel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.exc import DBAPIError

from service import chain, refusals
from service.shared import heartbeat, schema
from service.shared.queue import broker_url
from service.shared.settings import Settings, spool_folder
from service.spool import waiting
from service.web.access import TheWeb, Web

CHAIN_LATE_S = 300.0
PING_TIMEOUT_S = 2.0
SOCKET_SCHEME = "redis+socket://"

router = APIRouter(prefix="/health", tags=["health"])


class Check(BaseModel):
    """One dependency. `needed`: without it this service is not ready."""

    ok: bool
    needed: bool = True
    detail: str


class Alive(BaseModel):
    alive: bool = True


class Ready(BaseModel):
    """Ready when every check of what is needed is ok."""

    ready: bool
    checks: dict[str, Check]
    refused_last_day: int  # associations and instances; who and why: /api/v1/refusals


@router.get("/live")
def live() -> Alive:
    """This process answers."""
    return Alive()


@router.get("/ready", responses={503: {"model": Ready, "description": "Something that is needed is not well"}})
def ready(web: TheWeb, response: Response) -> Ready:
    """Every dependency: database and its schema, queue, disk, spool, workers, audit chain. 503 when a needed one is
    not well."""
    checks = check_all(web)
    well = all(check.ok for check in checks.values() if check.needed)
    refused = sum(one.count for one in refusals.last_day(spool_folder(web.settings), web.clock()))
    response.status_code = 200 if well else 503
    response.headers["Cache-Control"] = "no-store"
    return Ready(ready=well, checks=checks, refused_last_day=refused)


def check_all(web: Web) -> dict[str, Check]:
    return {
        "database": _database(web),
        "queue": _queue(web.settings),
        "disk": _disk(web.settings),
        "spool": _spool(web.settings),
        "workers": _workers(web),
        "audit chain": _chain(web),
    }


def queue_client(settings: Settings) -> redis.Redis:
    """The Redis that Celery speaks to; its messages wait in a list that has the queue's name."""
    url = broker_url(settings)
    limits: dict[str, Any] = {
        "socket_timeout": PING_TIMEOUT_S,
        "socket_connect_timeout": PING_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),  # the next look comes soon enough
    }
    if url.startswith(SOCKET_SCHEME):
        return redis.Redis(unix_socket_path=unquote(url.removeprefix(SOCKET_SCHEME)), **limits)
    return redis.Redis.from_url(url, **limits)


def _database(web: Web) -> Check:
    try:
        with web.reading() as session:
            current = schema.is_current_on(session.connection())
    except DBAPIError as error:
        return Check(ok=False, detail=f"does not answer ({type(error).__name__}); see [database] url")
    if not current:
        return Check(ok=False, detail="its schema is of another version; `serve` upgrades it")
    return Check(ok=True, detail="answers, its schema is of this version")


def _queue(settings: Settings) -> Check:
    try:
        with queue_client(settings) as client:
            waiting = client.llen(settings.queue.name)
    except RedisError as error:
        return Check(ok=False, detail=f"does not answer ({type(error).__name__}); see [queue] url")
    return Check(ok=True, detail=f"answers, {waiting} messages waiting")


def _disk(settings: Settings) -> Check:
    folder = _existing(spool_folder(settings))
    free_gb = shutil.disk_usage(folder).free / 1e9
    well = free_gb >= settings.spool.min_free_gb
    return Check(ok=well, detail=f"{free_gb:.1f} GB free, {settings.spool.min_free_gb:g} GB are kept free")


def _spool(settings: Settings) -> Check:
    folder = spool_folder(settings)
    if not folder.is_dir():
        return Check(ok=False, detail="not there yet; the receiver makes it")
    if not os.access(folder, os.R_OK | os.X_OK):
        return Check(ok=False, detail="cannot be read by this process")
    try:
        count = len(waiting(folder))
    except FileNotFoundError:  # it is being made
        return Check(ok=False, detail="not whole yet; the receiver makes it")
    return Check(ok=True, detail=f"readable, {count} instances waiting")


def _workers(web: Web) -> Check:
    try:
        with web.reading() as session:
            found = heartbeat.workers(session, web.clock())
    except DBAPIError as error:
        return Check(ok=False, needed=False, detail=f"not known ({type(error).__name__})")
    there = [one for one in found if not one["silent"]]
    silent = f", {len(found) - len(there)} silent" if len(there) < len(found) else ""
    if not there:
        return Check(ok=False, needed=False, detail=f"none is there{silent}; what is received waits")
    reading = sum(one["study_id"] is not None for one in there)
    return Check(ok=not silent, needed=False, detail=f"{len(there)} there, {reading} reading{silent}")


def _chain(web: Web) -> Check:
    try:
        with web.reading() as session:
            lag = chain.lag(session)
    except DBAPIError as error:
        return Check(ok=False, needed=False, detail=f"not known ({type(error).__name__})")
    age_s = 0.0 if lag.oldest_waiting_at is None else (web.clock() - lag.oldest_waiting_at).total_seconds()
    well = age_s < CHAIN_LATE_S
    return Check(ok=well, needed=False, detail=f"{lag.chained} events, {lag.waiting} wait for it")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())
