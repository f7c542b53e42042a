"""Sign in at the hospital's own service: OpenID Connect 1.0, authorization code flow with PKCE (RFC 7636).

Knows HTTP towards that service and its tokens; nothing of our pages and accounts.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import httpx2
from authlib.common.urls import add_params_to_uri
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from service.shared.settings import WebSettings

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
TIMEOUT_S = 10.0
CLOCK_SKEW_S = 30
PENDING_LIFE = timedelta(minutes=10)
MOST_PENDING = 1000
CALLBACK = "/login/oidc/callback"
AFTERWARDS = "/login"  # where the service sends a browser that it signed out


class NotSignedIn(Exception):
    """The sign-in service vouches for nobody; the message says why, in words for a person, without a token."""


@dataclass(frozen=True, slots=True)
class Person:
    """Whom the service vouches for."""

    subject: str
    name: str
    roles: tuple[str, ...]  # as the service calls them
    id_token: str = field(default="", repr=False)  # tells the service at the end whom to sign out


@dataclass(frozen=True, slots=True)
class Attempt:
    """A sign-in that was begun here and has not come back yet."""

    nonce: str
    verifier: str
    following: str
    begun_at: datetime


@dataclass(slots=True)
class SignInService:
    """One provider. What it says of itself and its keys are fetched when first needed, and kept."""

    settings: WebSettings
    _attempts: dict[str, Attempt] = field(default_factory=dict)
    _about: dict[str, Any] | None = None
    _keys: KeySet | None = None
    _lock: Lock = field(default_factory=Lock)

    def begin(self, following: str, now: datetime) -> tuple[str, str]:
        """Where to send the browser, and the state that it must bring back."""
        attempt = Attempt(secrets.token_urlsafe(24), secrets.token_urlsafe(48), following, now)
        state = secrets.token_urlsafe(24)
        with _in_words(), self._client() as client:
            address, _ = client.create_authorization_url(
                self._endpoint(client, "authorization_endpoint"),
                state=state,
                nonce=attempt.nonce,
                code_verifier=attempt.verifier,
            )
        with self._lock:
            self._attempts = {key: one for key, one in self._attempts.items() if now - one.begun_at < PENDING_LIFE}
            while len(self._attempts) >= MOST_PENDING:
                del self._attempts[next(iter(self._attempts))]
            self._attempts[state] = attempt
        return address, state

    def finish(self, state: str, code: str, now: datetime) -> tuple[Person, str]:
        """Who came back, and where they wanted to go. A state and a code are good once."""
        with self._lock:
            attempt = self._attempts.pop(state, None)
        if attempt is None or now - attempt.begun_at >= PENDING_LIFE:
            raise NotSignedIn("this sign-in was not begun here, or too long ago; please begin again")
        with _in_words(), self._client() as client:
            answer = client.fetch_token(
                self._endpoint(client, "token_endpoint"),
                code=code,
                grant_type="authorization_code",
                code_verifier=attempt.verifier,
            )
            if "id_token" not in answer:
                raise NotSignedIn("the sign-in service sent no ID token; is the scope `openid` allowed?")
            claims = self._claims(client, answer, attempt.nonce, now)
        return replace(self._person(claims), id_token=answer["id_token"]), attempt.following

    def leave(self, id_token: str) -> str | None:
        """Where the browser goes to be signed out there too; None where the service has no such place.

        OpenID Connect RP-Initiated Logout 1.0. The place must be of the issuer's own origin: browsers follow a form to
        no other (Content-Security-Policy: form-action).
        """
        with _in_words(), self._client() as client:
            about = self._metadata(client)
        place = about.get("end_session_endpoint")
        if not isinstance(place, str) or origin(place) != origin(self.settings.oidc_issuer or ""):
            return None
        asked = {
            "client_id": self.settings.oidc_client_id or "",
            "post_logout_redirect_uri": (self.settings.public_url or "").rstrip("/") + AFTERWARDS,
        }
        if id_token:
            asked["id_token_hint"] = id_token
        return str(add_params_to_uri(place, list(asked.items())))

    def _claims(self, client: OAuth2Client, answer: dict[str, Any], nonce: str, now: datetime) -> CodeIDToken:
        """The claims of an ID token whose signature, issuer, audience, times and nonce hold (OIDC Core 3.1.3.7)."""
        token = self._verified(client, answer["id_token"])
        claims = CodeIDToken(
            token.claims,
            token.header,
            options={
                "iss": {"essential": True, "value": self.settings.oidc_issuer},
                "aud": {"essential": True, "value": self.settings.oidc_client_id},
            },
            params={
                "nonce": nonce,
                "client_id": self.settings.oidc_client_id,
                "access_token": answer.get("access_token"),
            },
        )
        claims.validate(now=int(now.timestamp()), leeway=CLOCK_SKEW_S)
        return claims

    def _verified(self, client: OAuth2Client, id_token: str) -> jwt.Token:
        known = self._keys
        if known is None:
            known = self._fetch_keys(client)
        try:
            return jwt.decode(id_token, known, algorithms=ALGORITHMS)
        except (InvalidKeyIdError, ValueError):  # the service may have changed its keys since
            return jwt.decode(id_token, self._fetch_keys(client), algorithms=ALGORITHMS)

    def _fetch_keys(self, client: OAuth2Client) -> KeySet:
        self._keys = KeySet.import_key_set(self._fetch(client, self._endpoint(client, "jwks_uri")))
        return self._keys

    def _endpoint(self, client: OAuth2Client, name: str) -> str:
        return str(self._metadata(client)[name])

    def _metadata(self, client: OAuth2Client) -> dict[str, Any]:
        """What the service says of itself (OpenID Connect Discovery 1.0)."""
        if self._about is None:
            issuer = self.settings.oidc_issuer or ""
            about = self._fetch(client, issuer.rstrip("/") + "/.well-known/openid-configuration")
            if about.get("issuer") != issuer:
                raise NotSignedIn("the sign-in service names another issuer than [web] oidc_issuer")
            self._about = about
        return self._about

    def _fetch(self, client: OAuth2Client, address: str) -> Any:
        answer = client.request("GET", address, withhold_token=True)
        answer.raise_for_status()
        return answer.json()

    def _client(self) -> OAuth2Client:
        file = self.settings.oidc_client_secret_file
        secret = file.read_text(encoding="utf-8").strip() if file else None
        return OAuth2Client(
            client_id=self.settings.oidc_client_id,
            client_secret=secret,
            token_endpoint_auth_method="client_secret_basic" if secret else "none",
            scope=self.settings.oidc_scope,
            redirect_uri=(self.settings.public_url or "").rstrip("/") + CALLBACK,
            code_challenge_method="S256",
            verify=ssl.create_default_context(cafile=self.settings.oidc_ca),
            timeout=TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
        )

    def _person(self, claims: CodeIDToken) -> Person:
        name = claims.get(self.settings.oidc_user_claim)
        if not isinstance(name, str):
            raise NotSignedIn(f"the ID token has no {self.settings.oidc_user_claim!r}; see [web] oidc_user_claim")
        return Person(str(claims["sub"]), name.lower(), _names(claims, self.settings.oidc_role_claim))


def origin(address: str) -> str:
    """Scheme, host and port."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


def _names(claims: dict[str, Any], path: str) -> tuple[str, ...]:
    """What stands at `path`: the claim of that name, or one within others; a list or a single name."""
    found: Any = claims.get(path)
    if found is None:
        found = claims
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, str):
        return (found,)
    return tuple(one for one in found if isinstance(one, str)) if isinstance(found, Iterable) else ()


@contextmanager
def _in_words() -> Iterator[None]:
    """Faults of the sign-in service and of what it sent, in words; its own texts are not repeated."""
    try:
        yield
    except OAuthError as error:
        raise NotSignedIn("the sign-in service did not accept the code") from error
    except JoseError as error:
        raise NotSignedIn(f"the ID token does not hold: {error.error}") from error
    except httpx2.HTTPError as error:
        raise NotSignedIn(f"the sign-in service does not answer as it should ({type(error).__name__})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotSignedIn(f"the sign-in service cannot be used ({type(error).__name__})") from error
