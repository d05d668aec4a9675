"""An overload does not flood the log."""

import pytest

from service.errors import Overloaded, ShuttingDown
from service.refusals import RefusalLog


def test_refusals_are_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """The first is logged at once, those of the next second are counted in the line after it."""
    now = 100.0
    log = RefusalLog(lambda: now)
    log.log(Overloaded("full"))
    for _ in range(3):
        now += 0.3
        log.log(Overloaded("full"))
    for _ in range(2):
        now += 1.1
        log.log(Overloaded("full"))
    assert caplog.messages == [
        "Overloaded: full (0 more since the last such line)",
        "Overloaded: full (3 more since the last such line)",
        "Overloaded: full (0 more since the last such line)",
    ]


def test_every_other_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Only overloads come in floods."""
    log = RefusalLog(lambda: 0.0)
    log.log(ShuttingDown("bye"))
    log.log(ShuttingDown("bye"))
    assert caplog.messages == ["Shutting down: bye"] * 2
