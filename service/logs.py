"""How the log is written: for people or for machines, one way for our lines and uvicorn's."""

import logging
from datetime import UTC, datetime
from typing import Any

import orjson

from service.context import request_id, trace_id
from service.settings import Settings

logger = logging.getLogger(__name__)


def configure(settings: Settings) -> None:
    """Send all lines of this process, warnings of libraries included, to standard error in one form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if settings.log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    # Uvicorn's own account of its start and stop repeats ours.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))
    if settings.access_log:
        logging.getLogger("service.access").setLevel(logging.INFO)


def announce(bound: tuple[Any, ...], served_by: str) -> None:
    """Say where people reach the service, by the name of the socket that listens."""
    host, port = bound[:2]
    address = f"[{host}]" if ":" in host else host
    logger.info("serving on http://%s:%d (%s), documented at /docs", address, port, served_by)


class ConsoleFormatter(logging.Formatter):
    """`time level logger: message [request id trace id]`, and the stack below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 # logging's name
        line = super().formatMessage(record)
        identities = " trace ".join(filter(None, (request_id.get(), trace_id.get())))
        return f"{line} [{identities}]" if identities else line


class JSONFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, and where there are some
    `request_id`, `trace_id`, `exception` and the record's `fields`.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := request_id.get():
            entry["request_id"] = identity
        if trace := trace_id.get():
            entry["trace_id"] = trace
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=repr).decode()
