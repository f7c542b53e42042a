"""A small OpenID Connect provider, as a process of its own: discovery, keys, code flow with PKCE, signed ID tokens.

Whoever comes to its authorization endpoint is signed in as the person that was posted to /person last; `fault` there
makes the next tokens wrong in one way. It signs out whom an ID token of its own names, and sends the browser to the one
address that is registered for that. Run: python -m tests.oidc_provider PORT
"""

from __future__ import annotations

import base64
import json
import secrets
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, RSAKey

CLIENT, SECRET = "medpruner", "a secret of the client"
AFTERWARDS = "http://testserver/login"


class Provider(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.issuer = f"http://127.0.0.1:{port}"
        self.key = RSAKey.generate_key(2048, {"kid": "first", "use": "sig"})
        self.person: dict[str, Any] = {}
        self.codes: dict[str, dict[str, str]] = {}

    def id_token(self, asked: dict[str, str]) -> str:
        now, fault = int(time.time()), self.person.get("fault")
        claims = {
            "iss": self.issuer,
            "sub": self.person["sub"],
            "aud": CLIENT,
            "iat": now,
            "exp": now + 300,
            "nonce": asked["nonce"],
            "preferred_username": self.person["name"],
            "realm": {"roles": self.person["roles"]},
        }
        wrong = {
            "nonce": {"nonce": "of somebody else"},
            "audience": {"aud": "another-client"},
            "issuer": {"iss": "http://127.0.0.1:1"},
            "expired": {"iat": now - 900, "exp": now - 600},
        }
        claims |= wrong.get(fault or "", {})
        if fault == "alg-none":
            parts = (json.dumps(one).encode() for one in ({"alg": "none", "kid": "first"}, claims))
            return ".".join(base64.urlsafe_b64encode(one).rstrip(b"=").decode() for one in parts) + "."
        if fault == "hmac":  # signed with the public key as if it were a shared secret
            return jwt.encode(
                {"alg": "HS256", "kid": "first"}, claims, OctKey.import_key(self.key.as_pem(private=False))
            )
        key = RSAKey.generate_key(2048, {"kid": "first"}) if fault == "other-key" else self.key
        return jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)

    def change_key(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": secrets.token_hex(4), "use": "sig"})


class Handler(BaseHTTPRequestHandler):
    server: Provider

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        asked = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        match urlsplit(self.path).path:
            case "/.well-known/openid-configuration":
                issuer = self.server.issuer
                self.answer(
                    200,
                    {
                        "issuer": issuer,
                        "authorization_endpoint": f"{issuer}/authorize",
                        "token_endpoint": f"{issuer}/token",
                        "jwks_uri": f"{issuer}/keys",
                        "end_session_endpoint": f"{issuer}/end",
                    },
                )
            case "/end":
                self.end(asked)
            case "/keys":
                self.answer(200, KeySet([self.server.key]).as_dict(private=False))
            case "/authorize":
                self.authorize(asked)
            case _:
                self.answer(404, {})

    def authorize(self, asked: dict[str, str]) -> None:
        right = {"client_id": CLIENT, "response_type": "code", "code_challenge_method": "S256"}
        if any(asked.get(key) != value for key, value in right.items()) or "openid" not in asked["scope"].split():
            self.answer(400, {"error": "invalid_request"})
            return
        code = secrets.token_urlsafe()
        self.server.codes[code] = asked
        answer = {"state": asked["state"], "iss": self.server.issuer}
        answer |= {"error": "access_denied"} if self.server.person.get("fault") == "denied" else {"code": code}
        self.send_response(302)
        self.send_header("Location", f"{asked['redirect_uri']}?{urlencode(answer)}")
        self.end_headers()

    def end(self, asked: dict[str, str]) -> None:
        """RP-Initiated Logout 1.0: the hint is ours and the client's, the address is registered."""
        claims = jwt.decode(asked["id_token_hint"], KeySet([self.server.key])).claims
        right = claims["aud"] == asked["client_id"] == CLIENT and asked["post_logout_redirect_uri"] == AFTERWARDS
        if not right:
            self.answer(400, {"error": "invalid_request"})
            return
        self.send_response(302)
        self.send_header("Location", f"{AFTERWARDS}?signed_out={claims['sub']}")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/person":
            self.server.person = json.loads(body)
            if self.server.person.get("fault") == "new-key":
                self.server.change_key()
            self.answer(200, {})
            return
        sent = {key: values[0] for key, values in parse_qs(body).items()}
        asked = self.server.codes.pop(sent.get("code", ""), None)
        credentials = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        right = (
            asked is not None
            and self.headers.get("Authorization") == f"Basic {credentials}"
            and sent["redirect_uri"] == asked["redirect_uri"]
            and create_s256_code_challenge(sent["code_verifier"]) == asked["code_challenge"]
        )
        if not right or asked is None:
            self.answer(400, {"error": "invalid_grant"})
            return
        token = {"access_token": secrets.token_urlsafe(), "token_type": "Bearer", "expires_in": 300}
        self.answer(200, token | {"id_token": self.server.id_token(asked)})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    Provider(int(sys.argv[1])).serve_forever()
