"""GET /metrics for Prometheus: from this machine, from [web] metrics_addresses, or with a token."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from fastapi import APIRouter, HTTPException, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.metrics import CONTENT_TYPE, exposition
from service.situation import look
from service.tally import Names, read_totals
from service.web.access import TheWeb, Web, find_visitor

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")  # a proxy on this machine speaks for somebody elsewhere

router = APIRouter()
_bearer = HTTPBearer(auto_error=False)


@router.get("/metrics", include_in_schema=False)
def metrics(
    request: Request, web: TheWeb, bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> Response:
    """Counts, ages, latencies and shares, without patient data; one row of totals and a few counts."""
    if not _is_near(request, web) and (bearer is None or find_visitor(request, None, bearer.credentials) is None):
        raise HTTPException(401, "[web] metrics_addresses, or a token of `./run user token NAME`")
    with web.reading() as session:
        situation = look(session, web.settings, web.clock())
        _, totals = read_totals(session)
    content = exposition(situation, totals, Names.of(web.settings))
    return Response(content, media_type=CONTENT_TYPE, headers={"Cache-Control": "no-store"})


def _is_near(request: Request, web: Web) -> bool:
    """Comes straight from this machine or from an address that may read metrics?"""
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or any(address in network for network in web.settings.web.metrics_addresses)
