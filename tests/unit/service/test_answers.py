"""Answers that pynetdicom's reactor takes off the queue before the sender does, on an association of two real peers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

from pynetdicom import AE, Association, build_context, build_role, evt
from pynetdicom.sop_class import Verification

from service.answers import keep_answers
from tests.receiving import accepting
from tests.servers import wait_for


class Dawdling(threading.Event):
    """The checkpoint of a reactor that was let on and goes on only when an answer has come, as on a busy machine."""

    def __init__(self, messages: Queue[Any]) -> None:
        super().__init__()
        self.set()
        self.messages, self.let_on, self.around = messages, threading.Event(), threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if self.let_on.is_set():
            self.around.set()
        over = super().wait(timeout)
        if not self.let_on.is_set():
            self.let_on.set()
            wait_for(self.messages.qsize, "an answer", pause_s=0.001)
        return over


def echo(hold: Callable[[Association], Association]) -> int | None:
    """The status of a C-ECHO whose answer the reactor takes before the sender looks for it."""
    peer, sender = AE("PEER"), AE("SENDER")
    peer.add_supported_context(Verification)
    sender.dimse_timeout = 1
    with accepting(peer, ("127.0.0.1", 0), []) as port:
        association = sender.associate("127.0.0.1", port, contexts=[build_context(Verification)])
        checkpoint = association._reactor_checkpoint = Dawdling(association.dimse.msg_queue)
        send = association.dimse.send_msg

        def send_and_look_away(*message: Any) -> None:
            send(*message)
            checkpoint.around.wait(10)

        association.dimse.send_msg = send_and_look_away  # type: ignore[method-assign]
        checkpoint.let_on.wait(10)
        status: int | None = hold(association).send_c_echo().get("Status")
        association.abort()
    return status


def test_answer_that_the_reactor_took_reaches_the_sender() -> None:
    """As pynetdicom is, it is lost."""
    assert echo(lambda association: association) is None
    assert echo(keep_answers) == 0x0000


def test_request_of_the_peer_is_still_served() -> None:
    """A C-ECHO that comes on our own association is answered."""
    peer, sender = AE("PEER"), AE("SENDER")
    peer.add_supported_context(Verification, scu_role=True, scp_role=True)
    accepted: list[Association] = []
    with accepting(peer, ("127.0.0.1", 0), [(evt.EVT_ESTABLISHED, lambda event: accepted.append(event.assoc))]) as port:
        association = sender.associate(
            "127.0.0.1",
            port,
            contexts=[build_context(Verification)],
            ext_neg=[build_role(Verification, scu_role=True, scp_role=True)],  # type: ignore[list-item]
        )
        keep_answers(association)
        wait_for(lambda: accepted, "the association stands on both sides")
        assert accepted[0].send_c_echo().Status == 0x0000
        assert association.send_c_echo().Status == 0x0000
        association.release()
