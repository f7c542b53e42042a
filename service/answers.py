"""An answer that pynetdicom's reactor took for a request -> back to whoever waits for it.

Before it sends, pynetdicom pauses the reactor of its association; one that was just let on still says that it is paused
(3.0.4, Association._run_reactor). On a busy machine it then takes the answer off the queue and drops it, and the sender
waits until its time limit for what has long arrived. The peer has stored the instance: it would be sent twice.
"""

from __future__ import annotations

from pynetdicom.association import Association
from pynetdicom.dimse_primitives import DimseServiceType


def keep_answers(association: Association) -> Association:
    """The same association; requests of the peer are served as before, late answers are dropped as before."""
    serve = association._serve_request

    def serve_or_give_back(message: DimseServiceType, context_id: int) -> None:
        someone_waits = not association._reactor_checkpoint.is_set()
        if someone_waits and not message.is_valid_request:
            association.dimse.msg_queue.put((context_id, message))
        else:
            serve(message, context_id)

    association._serve_request = serve_or_give_back  # type: ignore[method-assign,assignment]
    return association
