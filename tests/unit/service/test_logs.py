"""The forms of a log line."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from service.context import request_id
from service.logs import ConsoleFormatter, JSONFormatter


@pytest.fixture
def in_request() -> Iterator[None]:
    token = request_id.set("seven")
    yield
    request_id.reset(token)


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


def test_a_console_line_ends_with_the_request_id(in_request: None) -> None:
    """People find a request's lines by the id that its answer had."""
    assert ConsoleFormatter().format(record("%d rows", 3)).endswith(" WARNING service.test: 3 rows [seven]")


def test_a_console_line_outside_a_request_has_no_id() -> None:
    """At start and stop there is nothing to tell."""
    assert ConsoleFormatter().format(record("ready")).endswith(" WARNING service.test: ready")
