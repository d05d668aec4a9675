"""The forms of a log line."""

import json
import logging
import os
import sys
from collections.abc import Iterator

import pytest

from service.context import request_id
from service.logs import ConsoleFormatter, JSONFormatter, configure, warn_of_unknown_settings
from service.settings import Settings


@pytest.fixture
def in_request() -> Iterator[None]:
    token = request_id.set("seven")
    yield
    request_id.reset(token)


@pytest.fixture
def levels() -> Iterator[None]:
    """Gives the loggers back as they were."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "python_multipart", "service.access")]
    before = [logger.level for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_access_log_is_asked_for_by_itself(wanted: bool, levels: None) -> None:
    """Whoever wants it has it, however few of the other lines are wanted."""
    configure(Settings(access_log=wanted, log_level="warning"))
    assert logging.getLogger("service.access").isEnabledFor(logging.INFO) is wanted


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("service.test", logging.WARNING, __file__, 1, message, arguments, None)
    vars(made).update(extra)
    return made


def test_a_json_line_is_one_object(in_request: None) -> None:
    """Message, level, logger, request id and fields are keys; a line break does not end the line."""
    line = JSONFormatter().format(record("%s\nforged", "café", fields={"status": 200}))
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "warning",
        "logger": "service.test",
        "message": "café\nforged",
        "request_id": "seven",
        "status": 200,
    }


def test_a_json_line_holds_the_stack() -> None:
    """An exception stays in its line, under a key of its own."""
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        line = JSONFormatter().format(record("failed", exc_info=sys.exc_info()))
    entry = json.loads(line)
    assert "request_id" not in entry
    assert entry["exception"].endswith("RuntimeError: broken")


def test_a_json_line_takes_any_field() -> None:
    """What JSON has no form for is told as text."""
    assert json.loads(JSONFormatter().format(record("x", fields={"a": 1j})))["a"] == "1j"


def test_a_json_line_holds_what_is_no_unicode() -> None:
    """A path with bytes that are no UTF-8 costs nobody the line that names it."""
    line = JSONFormatter().format(record("%s is missing", os.fsdecode(b"caf\xe9"), fields={"a": 1j}))
    line.encode()
    entry = json.loads(line)
    assert (entry["message"], entry["a"]) == ("caf\udce9 is missing", "1j")


def test_a_console_line_ends_with_the_request_id(in_request: None) -> None:
    """People find a request's lines by the id that its answer had."""
    assert ConsoleFormatter().format(record("%d rows", 3)).endswith(" WARNING service.test: 3 rows [seven]")


def test_a_console_line_outside_a_request_has_no_id() -> None:
    """At start and stop there is nothing to tell."""
    assert ConsoleFormatter().format(record("ready")).endswith(" WARNING service.test: ready")


def test_misspelt_settings_are_told_from_what_kubernetes_sets(caplog: pytest.LogCaptureFixture) -> None:
    """A variable that is nearly a setting is named; those that come with a Service called capsnet are not."""
    links = [
        "CAPSNET_SERVICE_HOST",
        "CAPSNET_SERVICE_PORT",
        "CAPSNET_SERVICE_PORT_HTTP",
        "CAPSNET_PORT_8000_TCP",
        "CAPSNET_PORT_8000_TCP_PROTO",
        "CAPSNET_PORT_8000_TCP_PORT",
        "CAPSNET_PORT_8000_TCP_ADDR",
        "CAPSNET_GRPC_SERVICE_HOST",
    ]
    warn_of_unknown_settings([*links, "CAPSNET_PROT", "CAPSNET_PORT"])
    (line,) = caplog.messages
    assert line == "CAPSNET_PROT is no setting and has no effect; CAPSNET_PORT is"
