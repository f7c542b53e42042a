"""The receiver as a program of its own, which is what `serve` starts: `python -m service.receive [--config FILE]`.

The command line loads what every command needs, four seconds and 250 MB of it; a receiver that died must listen again
before its senders give up. `serve --role receive` is the same, less quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from service.certificates import CertificateError
from service.children import fork
from service.receiver import Receiver
from service.shared.log import set_up_logging
from service.shared.settings import ConfigurationError, Settings, load, spool_folder
from service.spool import Spool, SpoolInUse

GRACE_S = 20.0  # for open associations, once the program is to end
WATCH_S = 0.2  # how often the copies are looked at
ENDS = {signal.SIGTERM, signal.SIGINT}


class CannotReceive(Exception):
    """The port or the spool is somebody else's; the message names which, and where it is configured."""


def receive(settings: Settings, is_over: Callable[[float], bool]) -> None:
    """Receive until `is_over`, which waits for so many seconds at most and answers.

    CannotReceive when it cannot begin, or go on.
    """
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
    run(receiver, settings.scp.processes, is_over)


def run(receiver: Receiver, number: int, is_over: Callable[[float], bool]) -> None:
    """Accept what comes to a receiver that listens, in so many processes, until `is_over`, which each of them asks.

    They share its ports and its limits. Python runs one thread at a time, and eight associations in one process take
    twice the processor time of one. When one of them dies, all end: what it had open is recovered by the next start
    alone. CannotReceive then.
    """

    def accept() -> None:
        receiver.start()
        while not is_over(WATCH_S):
            pass
        receiver.stop(GRACE_S)

    copies = {fork(accept) for _ in range(number - 1)}
    receiver.start()
    while not is_over(WATCH_S):
        ended = {copy for copy in copies if os.waitpid(copy, os.WNOHANG)[0]}
        copies -= ended
        if ended:
            if is_over(0):  # what ends us has ended them a moment before
                break
            _send(copies, signal.SIGKILL)
            receiver.stop(0.0)
            raise CannotReceive("one of the receiver's processes ended; start it again")
    _send(copies, signal.SIGTERM)
    receiver.stop(GRACE_S)
    for copy in copies:
        os.waitpid(copy, 0)


def wait_for_signals() -> Callable[[float], bool]:
    """What waits for SIGTERM or SIGINT for so many seconds at most, and answers; before any thread or copy is made.

    They are not handled from now on: a handler may interrupt the thread that holds what it needs, for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    return lambda timeout_s: signal.sigtimedwait(ENDS, timeout_s) is not None


def _send(copies: Iterable[int], number: signal.Signals) -> None:
    for process in copies:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.receive", description="Receive until SIGTERM.")
    parser.add_argument("--config", type=Path, help="configuration file; without it, ./config.toml if any")
    is_over = wait_for_signals()
    try:
        settings = load(parser.parse_args(arguments).config, os.environ)
        set_up_logging(settings.log, role="receive")
        settings.data.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        receive(settings, is_over)
    except (ConfigurationError, CannotReceive) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
