"""`/`, the playground, and `/docs`, Swagger UI: all from our own address, without a way to the internet."""

from importlib.resources import files
from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.staticfiles import StaticFiles

from service.handling import Router

router = Router(include_in_schema=False)

_WEB = Path(str(files("service"))) / "web"
_SWAGGER_UI = Path(str(files("fastapi_offline"))) / "static"  # the package is used for these files alone

_PLAYGROUND = ("playground.css", "playground.js", "api.js", "dimensions.js", "examples.js", "pad.js")

_FILES = {
    "/": _WEB / "playground/index.html",
    **{f"/playground/{name}": _WEB / "playground" / name for name in _PLAYGROUND},
    "/docs": _WEB / "docs/index.html",
    "/docs/start.js": _WEB / "docs/start.js",
    "/docs/swagger-ui-bundle.js": _SWAGGER_UI / "swagger-ui-bundle.js",
    "/docs/swagger-ui.css": _SWAGGER_UI / "swagger-ui.css",
}

PAGE_PATHS = frozenset({*_FILES, "/openapi.json"})
"""Paths of the pages and what they are made of: the same for everybody, and nothing of what is served."""

_static = StaticFiles()  # for its conditional answers; paths are ours


def _serve(path: str, file: Path) -> None:
    async def answer(request: Request) -> Response:
        # A server need not send parts (RFC 9110, 14.2), and Starlette refuses a unit that it does not know.
        request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
        response = _static.file_response(file, file.stat(), request.scope)
        response.headers["accept-ranges"] = "none"
        # Browsers ask each time whether it has changed, or a page would meet scripts of the release before.
        response.headers["cache-control"] = "no-cache"
        return response

    router.add_api_route(path, answer, methods=["GET"])


for _path, _file in _FILES.items():
    _serve(_path, _file)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The document; FastAPI's own route for it would be counted with the paths that are not there."""
    return JSONResponse(request.app.openapi())
