"""Who may sign in: passwords as argon2id, sessions and tokens as digests. Knows nothing of HTTP.

There is no default password and no first user; `./run user add` makes one.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from threading import Lock

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.db import Role, UserAccount, WebSession
from service.shared.durable import digest

NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
SHORTEST_PASSWORD = 12
LONGEST_PASSWORD = 256  # bounds what one request can make argon2 hash
SEEN_EVERY = timedelta(seconds=30)  # a session's `seen_at` is not written more often
TOKEN_LIFE = timedelta(days=365)

_hasher = PasswordHasher()  # argon2id with the parameters of RFC 9106, low-memory choice: 64 MiB, 3 rounds


class AccountError(Exception):
    """That account cannot be made, changed or removed; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class SignedIn:
    """Who a session or token belongs to."""

    name: str
    role: Role
    secret_sha256: str
    is_token: bool


def count_users(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(UserAccount).where(UserAccount.removed_at.is_(None))) or 0


def list_users(session: Session) -> Sequence[UserAccount]:
    """Every account that may sign in, by name."""
    return session.scalars(select(UserAccount).where(UserAccount.removed_at.is_(None)).order_by(UserAccount.name)).all()


def add_user(session: Session, name: str, password: str, role: Role, *, now: datetime, actor: str) -> None:
    """Make an account; AccountError when the name is taken, was ever taken, or the password is too short."""
    if not NAME.fullmatch(name):
        raise AccountError(f"user name {name!r}: 1 to 64 of a-z 0-9 . _ @ -, beginning with a letter or digit")
    if session.scalar(select(UserAccount.id).where(UserAccount.name == name)) is not None:
        raise AccountError(f"user name {name!r} is taken, or was: names of removed users stay theirs in the history")
    hashed = _hash(password)
    session.add(UserAccount(name=name, password_hash=hashed, role=role, created_at=now))
    audit.append(session, AuditKind.USER_ADDED, now=now, actor=actor, user=name, role=role.value)


def change_user(
    session: Session, name: str, *, password: str | None = None, role: Role | None = None, now: datetime, actor: str
) -> None:
    """Set a new password or role; every session and token of the user ends."""
    user = _user(session, name)
    if user.issuer is not None:
        raise AccountError(f"{name!r} signs in at {user.issuer}; password and role are decided there")
    if password is not None:
        user.password_hash = _hash(password)
    if role is not None:
        user.role = role
    session.execute(delete(WebSession).where(WebSession.user_id == user.id))
    audit.append(session, AuditKind.USER_CHANGED, now=now, actor=actor, user=name, role=user.role.value)


def remove_user(session: Session, name: str, *, now: datetime, actor: str) -> None:
    """The user may not sign in any more; sessions and tokens end at once."""
    user = _user(session, name)
    user.removed_at = now
    user.password_hash = ""
    session.execute(delete(WebSession).where(WebSession.user_id == user.id))
    audit.append(session, AuditKind.USER_REMOVED, now=now, actor=actor, user=name)


def make_token(session: Session, name: str, *, now: datetime, actor: str) -> str:
    """A secret with which a program acts as the user for a year; it is shown once and not kept."""
    user = _user(session, name)
    secret = _open(session, user, now, now + TOKEN_LIFE, is_token=True)
    audit.append(session, AuditKind.TOKEN_MADE, now=now, actor=actor, user=name)
    return secret


def sign_in(session: Session, name: str, password: str, *, now: datetime, life: timedelta, address: str) -> str | None:
    """Check name and password and open a session: its secret, or None. Both are audited.

    An unknown name costs as much time as a wrong password, and is not written down: people type passwords there.
    """
    user = session.scalar(select(UserAccount).where(UserAccount.name == name, UserAccount.removed_at.is_(None)))
    hashed = user.password_hash if user else _nobodys_hash()
    if not _matches(hashed, password) or user is None:
        known = user.name if user else None
        audit.append(session, AuditKind.SIGN_IN_FAILED, now=now, actor="web", address=address, user=known)
        return None
    if _hasher.check_needs_rehash(user.password_hash):
        user.password_hash = _hasher.hash(password)
    secret = _open(session, user, now, now + life, is_token=False)
    audit.append(session, AuditKind.SIGNED_IN, now=now, actor=f"web/{name}", address=address)
    return secret


def admit(
    session: Session,
    name: str,
    role: Role,
    *,
    issuer: str,
    subject: str,
    now: datetime,
    life: timedelta,
    address: str,
) -> str:
    """Open a session for a person whom a sign-in service vouches for: its secret. The first time makes an account.

    AccountError when the name is another person's here, or this person was removed.
    """
    if not NAME.fullmatch(name):
        raise AccountError("the user name of the sign-in service is not of a-z 0-9 . _ @ -; see oidc_user_claim")
    user = session.scalar(select(UserAccount).where(UserAccount.issuer == issuer, UserAccount.subject == subject))
    if user is None:
        if session.scalar(select(UserAccount.id).where(UserAccount.name == name)) is not None:
            raise AccountError("the user name of the sign-in service is another person's here")
        user = UserAccount(name=name, password_hash="", issuer=issuer, subject=subject, role=role, created_at=now)
        session.add(user)
        session.flush()
        audit.append(session, AuditKind.USER_ADDED, now=now, actor="web/oidc", user=name, role=role.value)
    if user.removed_at is not None:
        raise AccountError("this person was removed here; an administrator may not have meant to let them in again")
    if user.role is not role:
        user.role = role
        session.execute(delete(WebSession).where(WebSession.user_id == user.id))
        audit.append(session, AuditKind.USER_CHANGED, now=now, actor="web/oidc", user=user.name, role=role.value)
    secret = _open(session, user, now, now + life, is_token=False)
    audit.append(session, AuditKind.SIGNED_IN, now=now, actor=f"web/{user.name}", address=address, by="oidc")
    return secret


def best_role(names: Iterable[str], mapping: Mapping[str, str]) -> Role | None:
    """The role with the most rights among those that these names stand for; None: none of them does."""
    meant = {mapping[name] for name in names if name in mapping}
    return next((role for role in (Role.OPERATOR, Role.VIEWER, Role.AUDITOR) if role.value in meant), None)


def sign_out(session: Session, who: SignedIn, *, now: datetime, address: str) -> None:
    session.execute(delete(WebSession).where(WebSession.secret_sha256 == who.secret_sha256))
    audit.append(session, AuditKind.SIGNED_OUT, now=now, actor=f"web/{who.name}", address=address)


def who_holds(session: Session, secret: str, *, now: datetime, idle: timedelta) -> tuple[SignedIn, datetime] | None:
    """Whose session or token this is, with the time it was last seen; None when it is unknown or over."""
    row = session.execute(
        select(WebSession, UserAccount)
        .join(UserAccount, UserAccount.id == WebSession.user_id)
        .where(WebSession.secret_sha256 == digest(secret.encode()), UserAccount.removed_at.is_(None))
    ).one_or_none()
    if row is None:
        return None
    held, user = row
    if held.expires_at <= now or (not held.is_token and held.seen_at + idle <= now):
        return None
    return SignedIn(user.name, user.role, held.secret_sha256, held.is_token), held.seen_at


def touch(session: Session, who: SignedIn, *, now: datetime) -> None:
    """The session is in use; what is over is swept out on the way."""
    held = session.get(WebSession, who.secret_sha256)
    if held is not None:
        held.seen_at = now
    session.execute(delete(WebSession).where(WebSession.expires_at <= now))


def csrf_token(secret: str) -> str:
    """What a page of this session must send with every change: made from the secret, useless without its cookie."""
    return hmac.digest(secret.encode(), b"csrf", "sha256").hex()


def _user(session: Session, name: str) -> UserAccount:
    user = session.scalar(select(UserAccount).where(UserAccount.name == name, UserAccount.removed_at.is_(None)))
    if user is None:
        raise AccountError(f"no user is called {name!r}; `user list` names them")
    return user


def _open(session: Session, user: UserAccount, now: datetime, until: datetime, *, is_token: bool) -> str:
    secret = secrets.token_urlsafe(32)
    session.add(
        WebSession(
            secret_sha256=digest(secret.encode()),
            user_id=user.id,
            is_token=is_token,
            created_at=now,
            seen_at=now,
            expires_at=until,
        )
    )
    return secret


def _hash(password: str) -> str:
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise AccountError(f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters")
    return _hasher.hash(password)


@cache
def _nobodys_hash() -> str:
    return _hasher.hash(secrets.token_hex())


def _matches(hashed: str, password: str) -> bool:
    if len(password) > LONGEST_PASSWORD:
        return False
    try:
        return _hasher.verify(hashed, password)
    except (VerificationError, InvalidHashError):
        return False


@dataclass(slots=True)
class Throttle:
    """Failed sign-ins by name and by address: after a few, a wait that doubles. In memory: there is one web process."""

    free: int = 5
    first_wait_s: float = 2.0
    longest_wait_s: float = 900.0
    remembered: int = 10_000
    _failures: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def wait_s(self, keys: Sequence[str], now: datetime) -> float:
        """How long the caller must still wait; 0 when it may try."""
        with self._lock:
            return max(self._wait_s(key, now) for key in keys)

    def failed(self, keys: Sequence[str], now: datetime) -> None:
        with self._lock:
            for key in keys:
                count, _ = self._failures.pop(key, (0, now))
                self._failures[key] = (count + 1, now)
            while len(self._failures) > self.remembered:
                del self._failures[next(iter(self._failures))]

    def succeeded(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._failures.pop(key, None)

    def _wait_s(self, key: str, now: datetime) -> float:
        count, last = self._failures.get(key, (0, now))
        if count < self.free:
            return 0.0
        wait = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(count - self.free, 16))
        return max(0.0, wait - (now - last).total_seconds())
