"""The access log: a line for every request, over HTTP or gRPC."""

import logging
from collections.abc import Iterable

from service.context import Stage, totals

logger = logging.getLogger(__name__)


def log_access(
    *,
    client: str | None,
    method: str,
    path: str,
    route: str,
    status: int | str,
    seconds: float,
    stages: Iterable[Stage],
) -> None:
    """Log a request that has ended.

    Args:
        client: its address, if that is known.
        method: HTTP's, or `gRPC`.
        status: HTTP's, or gRPC's name for it.
    """
    fields = {
        "client": client,
        "method": method,
        "path": path,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
        "stages": {name: round(spent, 6) for name, spent in totals(stages).items()},
    }
    logger.info(
        "%(client)s %(method)s %(path)s %(status)s in %(seconds)s s", fields, extra={"fields": fields}
    )
