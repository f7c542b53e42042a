"""Certificates for the tests, made by openssl: an authority, and what it signs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


def authority(folder: Path, name: str = "authority") -> Pair:
    return _make(folder, name, ["-addext", "basicConstraints=critical,CA:TRUE"], days=30)


def issue(ca: Pair, folder: Path, name: str, *, days: int = 30) -> Pair:
    """A certificate for `name` on the loopback, signed by `ca`."""
    extensions = [
        *("-CA", str(ca.certificate), "-CAkey", str(ca.key)),
        *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", "basicConstraints=CA:FALSE"),
    ]
    return _make(folder, name, extensions, days=days)


def _make(folder: Path, name: str, options: list[str], *, days: int) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-out", str(pair.certificate), "-keyout", str(pair.key)]
    subject = ["-subj", f"/O=Test/CN={name}", "-days", str(days)]
    subprocess.run([*command, *files, *subject, *options], check=True, capture_output=True)
    pair.key.chmod(0o600)
    return pair
