"""How the log is written: for people or for machines, one way for our lines and uvicorn's."""

import difflib
import json
import logging
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import orjson

from service.context import request_id, trace_id
from service.settings import Settings

logger = logging.getLogger(__name__)

DATA_DIR = "CAPSNET_DATA_DIR"
"""Of training, which is often run beside the service."""

# What Kubernetes sets in every pod for a Service whose name begins with ours.
_SERVICE_LINK = re.compile(
    r"CAPSNET(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)"
)


def configure(settings: Settings) -> None:
    """Send all lines of this process, warnings of libraries included, to standard error in one form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if settings.log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    # Uvicorn's own account of its start and stop repeats ours.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))
    # It warns of each form that is broken; the caller is told of it.
    logging.getLogger("python_multipart").setLevel(max(logging.ERROR, logging.root.level))
    if settings.access_log:
        logging.getLogger("service.access").setLevel(logging.INFO)


def announce(bound: tuple[Any, ...], served_by: str, settings: Settings) -> None:
    """Say where people reach the service, by the name of the socket that listens, and who may call."""
    host, port = bound[:2]
    address = f"[{host}]" if ":" in host else host
    who = "who has an API key" if settings.api_keys else "everybody"
    logger.info("serving on http://%s:%d (%s) for %s, documented at /docs", address, port, served_by, who)


def warn_of_unknown_settings(environment: Iterable[str]) -> None:
    """Name the variables that look like settings and are none: a misspelt one has no effect."""
    known = {f"CAPSNET_{name.upper()}" for name in Settings.model_fields} | {DATA_DIR}
    for name in sorted(environment):
        if name.startswith("CAPSNET_") and name not in known and not _SERVICE_LINK.fullmatch(name):
            near = difflib.get_close_matches(name, known, 1)
            logger.warning("%s is no setting and has no effect%s", name, f"; {near[0]} is" if near else "")


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
        try:
            return orjson.dumps(entry, default=repr).decode()
        except TypeError:  # a path, say, whose bytes are no UTF-8
            return json.dumps(entry, default=repr)
