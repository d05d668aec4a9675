"""What becomes of a request that is cancelled from outside."""

import asyncio
from typing import Any

import pytest

from service.metrics import Metrics
from service.observation import Observation
from service.problems import GivenUp

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("stopping", "begun", "sent"),
    [(True, False, [503]), (False, False, []), (True, True, [200])],
    ids=["at the drain limit", "before a stop", "within its answer"],
)
async def test_what_the_server_gives_up_is_answered_once(
    stopping: bool, begun: bool, sent: list[int]
) -> None:
    """An answer stands for the cancellation only while the service stops, and where there is none yet.

    Of the latter the middleware knows that observes every answer, and stands around it as in the application.
    """
    statuses = []

    async def app(_: object, __: object, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": []}
    given_up = GivenUp(app, stopping=lambda: stopping)
    observed = Observation(given_up, Metrics(), None, access_log=False)
    request = asyncio.ensure_future(observed(scope, receive, send))
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.wait([request])
    assert statuses == sent
    assert request.cancelled() is (sent != [503])
