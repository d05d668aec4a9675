"""What gRPC's library does with calls at a stop, on which decision 15 relies."""

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import pytest


@pytest.mark.anyio
async def test_a_call_that_is_cancelled_by_a_stop_had_not_begun() -> None:
    """Each call that has reached its handler is answered; only such as have not can end as CANCELLED."""
    begun: set[bytes] = set()

    async def handle(request: bytes, _: Any) -> bytes:
        begun.add(request)
        if request == b"first":
            time.sleep(0.5)  # the event loop is busy while calls arrive
        await asyncio.sleep(0.05)
        return request

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Call": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def call_all() -> dict[bytes, str]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/test/Call")
            call(b"connected")
            pending = {b"first": call.future(b"first")}
            time.sleep(0.1)
            pending |= {name: call.future(name) for name in (b"%d" % number for number in range(50))}
            return {
                name: "OK" if (error := future.exception()) is None else error.code().name
                for name, future in pending.items()
            }

    calling = asyncio.create_task(asyncio.to_thread(call_all))
    while b"first" not in begun:
        await asyncio.sleep(0.001)
    await server.stop(10)
    outcomes = await calling
    assert Counter((outcome, name in begun) for name, outcome in outcomes.items()).keys() <= {
        ("OK", True),
        ("CANCELLED", False),
        ("UNAVAILABLE", False),
    }
    assert ("CANCELLED", False) in {(outcome, name in begun) for name, outcome in outcomes.items()}
