"""Sign-in by a proxy before us: it names the person in a header, and is believed only from its own address."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock

import structlog
from fastapi import HTTPException, Request

from service.shared.db import Role
from service.shared.settings import WebSettings
from service.web import accounts

MOST_REMEMBERED = 1000
OWN_ROLES = {role.value: role.value for role in Role}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Proxied:
    """Whom the proxy names."""

    name: str
    role: Role
    csrf: str


@dataclass(slots=True)
class ProxySignIn:
    """The people who came by the proxy, and the addresses that tried to be one."""

    settings: WebSettings
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))  # pages of before a restart are void
    _seen: dict[str, datetime] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    def person(self, request: Request) -> Proxied | None:
        """Whom the proxy names; None without its header. 403 for a name or role that cannot be.

        From an address that is not listed the header is ignored, which is logged once per address.
        """
        user_header, role_header = self.settings.proxy_user_header, self.settings.proxy_role_header
        if user_header is None or role_header is None or user_header not in request.headers:
            return None
        address = request.client.host if request.client else ""
        if not self._is_proxy(address):
            self._tell(address)
            return None
        users = request.headers.getlist(user_header)
        if len(users) != 1 or not accounts.NAME.fullmatch(users[0].strip().lower()):
            raise HTTPException(403, f"the proxy's {user_header} is not one name of a-z 0-9 . _ @ -")
        name = users[0].strip().lower()
        named = [one.strip() for one in ",".join(request.headers.getlist(role_header)).split(",")]
        role = accounts.best_role(named, OWN_ROLES | self.settings.role_mapping)
        if role is None:
            raise HTTPException(403, f"the proxy's {role_header} names no role; see [web] role_mapping")
        return Proxied(name, role, hmac.digest(self._secret, name.encode(), "sha256").hex())

    def is_new(self, name: str, now: datetime) -> bool:
        """Whether this person comes for the first time, or again after a pause: that is a sign-in, and is audited."""
        idle = timedelta(minutes=self.settings.session_idle_min)
        with self._lock:
            last = self._seen.pop(name, None)
            self._seen[name] = now
            while len(self._seen) > MOST_REMEMBERED:
                del self._seen[next(iter(self._seen))]
        return last is None or now - last >= idle

    def _is_proxy(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        return any(parsed in network for network in self.settings.proxy_addresses)

    def _tell(self, address: str) -> None:
        with self._lock:
            known = address in self._told
            if len(self._told) < MOST_REMEMBERED:
                self._told.add(address)
        if not known:
            log.warning("proxy_header_ignored", address=address, remedy="only [web] proxy_addresses may name a user")
