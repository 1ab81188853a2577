"""Is the server well, and a new login link for whoever holds the token."""

from fastapi import APIRouter, Depends, Request

from app.web.api.body import Answer, Verbs
from app.web.guard import anyone, signed_in

router = APIRouter(tags=["server"])


@router.get("/health", dependencies=[Depends(anyone)])
def read_health(service: Verbs) -> Answer:
    """Whether the server and its workers are well; needs no token."""
    return Answer(service.health())


@router.get("/system", dependencies=[Depends(signed_in)])
def read_system(service: Verbs) -> Answer:
    """Versions, devices, slots, memory and disk."""
    return Answer(service.system_report())


@router.post("/links", status_code=201, dependencies=[Depends(signed_in)])
def make_link(request: Request, service: Verbs) -> Answer:
    """A new one-time login link."""
    return Answer({"url": f"{request.base_url}login?link={service.make_link()}"}, 201)
