"""The receiver as a program of its own, which is what `serve` starts: `python -m service.receive [--config FILE]`.

The command line loads what every command needs, four seconds and 250 MB of it; a receiver that died must listen again
before its senders give up. `serve --role receive` is the same, less quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event

from service.certificates import CertificateError
from service.children import fork
from service.receiver import Receiver
from service.shared.log import set_up_logging
from service.shared.settings import ConfigurationError, Settings, load, spool_folder
from service.spool import Spool, SpoolInUse

GRACE_S = 20.0  # for open associations, once the program is to end
WATCH_S = 0.2  # how often the copies are looked at


class CannotReceive(Exception):
    """The port or the spool is somebody else's; the message names which, and where it is configured."""


def receive(settings: Settings, stop: Event) -> None:
    """Receive until `stop`; CannotReceive when it cannot begin, or go on."""
    spool = Spool(spool_folder(settings), int(settings.spool.min_free_gb * 1e9))
    try:
        vouching = frozenset(
            (one.ae_title, one.calling_ae_title or settings.scp.ae_title)
            for one in settings.destination
            if one.storage_commitment
        )
        receiver = Receiver(settings.scp, settings.source, spool, vouching=vouching)
        receiver.listen()
    except CertificateError as error:
        raise CannotReceive(f"[scp] tls: {error}") from error
    except (SpoolInUse, OSError) as error:
        text = str(error) if isinstance(error, SpoolInUse) else error.strerror
        raise CannotReceive(f"[scp] {settings.scp.host}:{settings.scp.port}: {text}") from error
    run(receiver, settings.scp.processes, stop)


def run(receiver: Receiver, number: int, stop: Event) -> None:
    """Accept what comes to a receiver that listens, in so many processes, until `stop`.

    They share its ports and its limits. Python runs one thread at a time, and eight associations in one process take
    twice the processor time of one. When one of them dies, all end: what it had open is recovered by the next start
    alone. CannotReceive then.
    """

    def accept() -> None:
        receiver.start()
        stop.wait()
        receiver.stop(GRACE_S)

    copies = {fork(accept) for _ in range(number - 1)}
    receiver.start()
    while not stop.wait(WATCH_S):
        for copy in copies:
            ended, status = os.waitpid(copy, os.WNOHANG)
            if ended:
                _send(copies - {copy}, signal.SIGKILL)
                receiver.stop(0.0)
                raise CannotReceive(f"a process of the receiver ended ({status}); start it again")
    _send(copies, signal.SIGTERM)
    receiver.stop(GRACE_S)
    for copy in copies:
        os.waitpid(copy, 0)


def _send(copies: Iterable[int], number: signal.Signals) -> None:
    for process in copies:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.receive", description="Receive until SIGTERM.")
    parser.add_argument("--config", type=Path, help="configuration file; without it, ./config.toml if any")
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load(parser.parse_args(arguments).config, os.environ)
        set_up_logging(settings.log, role="receive")
        settings.data.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        receive(settings, stop)
    except (ConfigurationError, CannotReceive) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
