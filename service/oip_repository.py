"""The Open Inference Protocol's repository extension over HTTP, where CAPSNET_REPOSITORY turns it on.

See docs/decisions/0016.
"""

from collections.abc import Awaitable
from typing import TypeVar, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from service import openapi
from service.bodies import aside, parse_json, read_body
from service.errors import RepositoryRefused
from service.handling import answer_in_time, service_of
from service.oip_schemas import ChangeRequest, IndexRequest
from service.repository import IndexEntry, Repository
from service.room import Share


def _refuse_foreign_pages(request: Request) -> None:
    """Let no page of another origin change what is served: a plain POST needs no leave from CORS.

    Browsers tell by `Sec-Fetch-Site` where a request comes from, without TLS by `Origin`; other clients send
    neither.

    Raises:
        RepositoryRefused: it comes from such a page, and the settings do not name its origin.
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if {origin, "*"} & set(service_of(request).settings.cors_origins):
        return
    host = request.headers.get("host")
    here = origin in (None, f"http://{host}", f"https://{host}")
    if site not in ("same-origin", "none") if site else not here:
        raise RepositoryRefused(
            "A page of another origin may not change what is served.",
            received=f"Origin: {origin}",
            expected="a page of this service, or of an origin that CAPSNET_CORS_ORIGINS names",
        )


router = APIRouter(
    prefix="/v2/repository",
    tags=["Open Inference Protocol"],
    dependencies=[Depends(_refuse_foreign_pages)],
)

Form = TypeVar("Form", bound=BaseModel)


@router.post(
    "/index",
    summary="Every version in the models folder, served or not",
    **openapi.repository_operation(IndexRequest),
)
async def index(request: Request) -> list[IndexEntry]:
    asked = await _form(IndexRequest, request)
    return await _repository(request).index(ready=asked.ready)


@router.post(
    "/models/{name}/load",
    summary="Serve what the models folder holds of this model",
    response_class=Response,
    **openapi.repository_operation(ChangeRequest),
)
async def load(request: Request, name: str) -> Response:
    """Load every version of the model that is not served yet, or only the one that `version` names.

    Each is verified and has run before any request can reach it; the newest is the default at once. Without
    `version`, versions whose folders are gone are retired. If one of them is broken, nothing changes. An
    encoder and its decoder are loaded together, whichever is named.
    """
    asked = await _form(ChangeRequest, request)
    return await _done(request, _repository(request).load(name, asked.parameters))


@router.post(
    "/models/{name}/unload",
    summary="Retire this model, or one version of it",
    response_class=Response,
    **openapi.repository_operation(ChangeRequest),
)
async def unload(request: Request, name: str) -> Response:
    """Retire every version of the model, or only the one that `version` names, and finish what uses it.

    The last version of the default model stays.
    """
    asked = await _form(ChangeRequest, request)
    return await _done(request, _repository(request).unload(name, asked.parameters))


def _repository(request: Request) -> Repository:
    return cast("Repository", service_of(request).repository)  # these routes are there only with it


async def _form(form: type[Form], request: Request) -> Form:
    service = service_of(request)
    with Share(service.body_room) as share:
        body = await read_body(request, service.settings, share, may_be_empty=True)
        return await aside(len(body), parse_json, form, body) if body else form()


async def _done(request: Request, change: Awaitable[None]) -> Response:
    async def work() -> Response:
        await change
        return Response()

    return await answer_in_time(request, work())
