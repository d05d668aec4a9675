"""The access log: a line for every request, over HTTP or gRPC."""

import logging
from collections.abc import Iterable

from service.context import Stage, totals

logger = logging.getLogger(__name__)

_LONGEST_PATH = 500  # characters: a line holds it twice, and a caller may choose any


def log_access(
    *,
    client: str | None,
    method: str,
    path: str,
    route: str,
    status: int | None = None,
    grpc_status: str | None = None,
    seconds: float,
    stages: Iterable[Stage],
) -> None:
    """Log a request that has ended.

    Args:
        client: its address, if that is known.
        method: HTTP's, or `gRPC`.
        path: quoted; a long one is cut.
        status: HTTP's; with neither this nor the next, there was no answer.
        grpc_status: gRPC's, by its name.
    """
    if len(path) > _LONGEST_PATH:
        path = path[:_LONGEST_PATH] + "[cut]"  # brackets are quoted in a path itself
    ended: dict[str, object] = {"aborted": True}
    if grpc_status is not None:
        ended = {"grpc_status": grpc_status}
    elif status is not None:
        ended = {"status": status}
    fields = {
        "client": client,
        "method": method,
        "path": path,
        "route": route,
        **ended,
        "seconds": round(seconds, 6),
        "stages": {name: round(spent, 6) for name, spent in totals(stages).items()},
    }
    told = grpc_status or status or "aborted"
    logger.info(
        "%s %s %s %s in %s s", client, method, path, told, fields["seconds"], extra={"fields": fields}
    )
