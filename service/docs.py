"""`/docs`: Swagger UI from our own address, so that the page works without a way to the internet."""

from importlib.resources import files
from pathlib import Path

from fastapi.responses import FileResponse

from service.handling import Router

router = Router(include_in_schema=False)

_WEB = Path(str(files("service"))) / "web"
_SWAGGER_UI = Path(str(files("fastapi_offline"))) / "static"  # the package is used for these files alone

_FILES = {
    "/docs": _WEB / "docs.html",
    "/docs/start.js": _WEB / "docs.js",
    "/docs/swagger-ui-bundle.js": _SWAGGER_UI / "swagger-ui-bundle.js",
    "/docs/swagger-ui.css": _SWAGGER_UI / "swagger-ui.css",
}

DOCS_PATHS = frozenset({*_FILES, "/openapi.json"})
"""The documentation's paths: the same for everybody, and nothing of what is served."""


def _serve(path: str, file: Path) -> None:
    async def answer() -> FileResponse:
        return FileResponse(file)

    router.add_api_route(path, answer, methods=["GET"])


for _path, _file in _FILES.items():
    _serve(_path, _file)
