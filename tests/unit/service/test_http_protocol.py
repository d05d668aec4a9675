"""Connections: what is read of them, and when, and how long an answer waits for its client."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service import http_protocol
from service.context import REFUSED, WHOLE
from service.http_protocol import LimitedProtocol
from service.refusals import RefusalLog
from service.room import Room

pytestmark = pytest.mark.anyio

LIMIT = 10.0  # seconds
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SIZE = 16 * 2**20  # bytes, more than the system takes of an answer that nobody reads


class App:
    """Answers everything, as a refusal or not; counts what reached it."""

    def __init__(self) -> None:
        self.refusing = True
        self.requests = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        if self.refusing:
            scope["state"][REFUSED] = True
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await self.between()
        await send({"type": "http.response.body", "body": b"ok"})

    async def between(self) -> None:
        """Between an answer's head and its body."""


@asynccontextmanager
async def served(
    app: App,
    *,
    answer_timeout: float = LIMIT,
    answer_room: Room | None = None,
    malformed: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[uvicorn.Server, asyncio.StreamReader, asyncio.StreamWriter]]:
    http = partial(
        LimitedProtocol,
        head_timeout=LIMIT,
        answer_timeout=answer_timeout,
        answer_room=answer_room or Room(2 * SIZE),
        malformed=malformed,
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, http=http))  # type: ignore[arg-type] # a factory does
    running = asyncio.create_task(server.serve())
    async with asyncio.timeout(LIMIT):
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await connected(server)
        yield server, reader, writer
        writer.close()
        server.should_exit = True
        await running


async def connected(server: uvicorn.Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)  # or the system would make it ever larger
    client.connect(server.servers[0].sockets[0].getsockname())
    return await asyncio.open_connection(sock=client)


async def answer(reader: asyncio.StreamReader) -> bytes:
    await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(2)


@pytest.mark.parametrize("line", [b"a: b\r\n", b"x" * 1000], ids=["many lines", "a long one"])
async def test_a_head_without_end_is_refused(line: bytes) -> None:
    """A head beyond the limit is not read on, whatever it is made of: it would take memory without end."""
    app = App()
    async with served(app) as (_, reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n")
        await refused(line, reader, writer)
    assert app.requests == 0


async def test_a_body_is_known_to_be_whole_once_it_is() -> None:
    """Whoever reads a request's body can tell whether some of it is still to come."""
    told: asyncio.Queue[bool] = asyncio.Queue()

    class Reader(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            told.put_nowait(WHOLE in scope["state"])
            while (await receive())["more_body"]:
                pass
            told.put_nowait(WHOLE in scope["state"])
            await super().__call__(scope, receive, send)

    app = Reader()
    app.refusing = False
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    async with served(app) as (_, reader, writer):
        for first, rest, whole in ((head + b"o", b"k", False), (head + b"ok", b"", True)):
            writer.write(first)
            assert await told.get() is whole
            writer.write(rest)
            assert await told.get()
            assert await answer(reader) == b"ok"


async def test_a_head_up_to_the_limit_is_read() -> None:
    """A large cookie is no attack; and a body, whose limit is another, is none either."""
    app = App()
    app.refusing = False
    async with served(app) as (_, reader, writer):
        for length in (0, 0, 300_000, 300_000):  # on a kept connection each has the whole limit
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nCookie: " % length
            cookie = b"c" * (http_protocol.MAX_HEAD - len(head) - 4)
            writer.write(head + cookie + b"\r\n\r\n" + bytes(length))
            assert await answer(reader) == b"ok"


async def test_a_head_in_pieces_has_one_limit() -> None:
    """The time for a head runs once, and ends with it: nothing closes the connection afterwards."""
    app = App()
    app.refusing = False
    async with served(app) as (server, reader, writer):
        await until(lambda: bool(server.server_state.connections))
        (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
        limit = connection._limit
        assert limit is not None
        writer.write(REQUEST[:9])
        await until(lambda: connection._unread == 9)
        assert connection._limit is limit
        writer.write(REQUEST[9:])
        assert await answer(reader) == b"ok"
        assert limit.cancelled()


async def test_trailers_without_end_are_refused() -> None:
    """What follows a body in chunks has the limit of a head: the request that holds it all ends."""
    left = asyncio.Event()

    class Reading(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

    async with served(Reading()) as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n")
        await refused(b"a: b\r\n", reader, writer)
        await left.wait()


@pytest.mark.parametrize("together", [True, False])
async def test_trailers_are_no_headers(together: bool) -> None:
    """What follows a body in chunks says nothing of the request, whether it comes with the head or later."""

    class Reading(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["more_body"]:
                pass
            self.headers = dict(scope["headers"])
            await super().__call__(scope, receive, send)

    app = Reading()
    app.refusing = False
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n"
    async with served(app) as (_, reader, writer):
        for _ in range(2):
            writer.write(head)
            if not together:
                await asyncio.sleep(0.05)
            writer.write(b"X-Request-ID: forged\r\n\r\n")
            assert await answer(reader) == b"ok"
            assert app.headers == {b"transfer-encoding": b"chunked"}


async def refused(line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send the line again and again; return when the connection is closed, before eight times the limit."""
    with contextlib.suppress(ConnectionError):  # what was still under way when it closed
        for _ in range(8 * http_protocol.MAX_HEAD // len(line)):
            writer.write(line)
            await writer.drain()
        assert await reader.read() == b""


async def test_a_refused_connection_is_read_again_when_its_rest_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a refused client sends at once waits unread until the rest is over, and is answered then."""
    monkeypatch.setattr(http_protocol, "REST", LIMIT)
    app = App()
    async with served(app) as (server, reader, writer):
        writer.write(REQUEST)
        assert await answer(reader) == b"ok"
        app.refusing = False
        writer.write(REQUEST)
        await asyncio.sleep(0.2)
        assert app.requests == 1
        (connection,) = server.server_state.connections
        cast("LimitedProtocol", connection).read_on()
        assert await answer(reader) == b"ok"
        writer.write(REQUEST)
        assert await answer(reader) == b"ok"  # that one was no refusal: no rest
    assert app.requests == 3


async def test_a_rest_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its rest a connection goes on without anybody's doing."""
    monkeypatch.setattr(http_protocol, "REST", 0.05)
    app = App()
    async with served(app) as (_, reader, writer):
        for _ in range(3):
            writer.write(REQUEST)
            assert await answer(reader) == b"ok"
    assert app.requests == 3


async def test_a_connection_rests_though_a_request_waits_behind_the_refused_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two requests in one go do not spare a client its rest: what it sends next waits unread."""
    monkeypatch.setattr(http_protocol, "REST", LIMIT)

    class Once(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await super().__call__(scope, receive, send)
            self.refusing = False

    app = Once()
    async with served(app) as (server, reader, writer):
        writer.write(2 * REQUEST)
        assert [await answer(reader) for _ in range(2)] == [b"ok", b"ok"]
        writer.write(REQUEST)
        await asyncio.sleep(0.2)
        assert app.requests == 2
        (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
        connection.read_on()
        assert await answer(reader) == b"ok"


async def test_of_requests_in_one_go_so_many_wait(caplog: pytest.LogCaptureFixture) -> None:
    """Those beyond the limit are not begun, and the last answer says that the connection ends with it."""
    app = App()
    app.refusing = False
    counted: list[None] = []
    most = http_protocol.MAX_WAITING + 1  # one is answered
    async with served(app, malformed=lambda: counted.append(None)) as (_, reader, writer):
        writer.write(most * REQUEST)
        for _ in range(most):
            assert b"connection: close" not in await reader.readuntil(b"ok")
        writer.write((most + 20) * REQUEST)
        answers = (await reader.read()).split(b"ok")
    assert app.requests == 2 * most
    assert [b"connection: close" in each for each in answers[:-1]] == [False] * (most - 1) + [True]
    assert answers[-1] == b""
    assert (counted, caplog.messages) == ([], [])


async def test_the_last_answer_to_requests_in_one_go_arrives() -> None:
    """What follows the last request that is read does not destroy its answer as the connection closes."""
    app = App()
    app.refusing = False
    async with served(app) as (_, reader, writer):
        writer.write(15_000 * REQUEST)  # more than is read at once
        answers = (await reader.read()).split(b"ok")
    assert len(answers) == http_protocol.MAX_WAITING + 2
    assert answers[-1] == b""


async def test_lines_of_a_head_have_a_limit() -> None:
    """A hundred are read, in a head and behind a body; one more is refused: each costs much memory."""
    app = Echo()
    lines = b"a: b\r\n" * (http_protocol.MAX_LINES - 1)
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked \r\n\r\n2\r\nhi\r\n0\r\n"
    async with served(app) as (server, reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
        writer.write(chunked + b"a: b\r\n" + lines + b"\r\n")
        assert [await answer(reader) for _ in range(2)] == [b"00", b"02"]
        for first in (b"GET / HTTP/1.1\r\nHost: x\r\na: b\r\n", chunked + 2 * b"a: b\r\n"):
            late_reader, late_writer = await connected(server)
            late_writer.write(first + lines + b"\r\n")
            refusal = await late_reader.read()
            assert refusal.startswith(b"HTTP/1.1 400")
            assert refusal.endswith(b"A head may have 100 lines.")
            late_writer.close()


async def test_who_leaves_behind_several_requests_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """The request that is answered hears of it, and those that waited are not begun."""
    left = asyncio.Event()

    class Reading(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.requests += 1
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    app = Reading()
    async with served(app) as (_, _, writer):
        writer.write(3 * REQUEST)
        await until(lambda: app.requests == 1)
        writer.transport.abort()
        await left.wait()
        await asyncio.sleep(0.05)
    assert app.requests == 1
    assert caplog.messages == []


async def test_a_connection_that_does_not_rest_is_not_read_on() -> None:
    """What uvicorn stopped reading, since its application is behind, stays unread at a stop."""
    app = App()
    app.refusing = False
    app.go_on.clear()
    async with served(app) as (server, _, writer):
        writer.write(2 * REQUEST)  # the second waits in the pipeline, and reading stops
        await writer.drain()
        while not app.requests:
            await asyncio.sleep(0.01)
        (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
        assert not connection.transport.is_reading()
        connection.read_on()
        assert not connection.transport.is_reading()
        app.go_on.set()


async def test_a_connection_that_was_reset_is_forgotten() -> None:
    """Nothing waits for the end of the idle time of a connection that is gone."""
    app = App()
    app.refusing = False
    async with served(app) as (server, reader, writer):
        writer.write(REQUEST)
        assert await answer(reader) == b"ok"
        (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
        assert connection.timeout_keep_alive_task is not None
        linger_not = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        writer.transport.abort()
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        assert connection.timeout_keep_alive_task is None


async def test_a_connection_that_ends_in_a_head_is_forgotten() -> None:
    """Nothing waits for the rest of a head that will not come."""
    async with served(App()) as (server, _, writer):
        await until(lambda: bool(server.server_state.connections))
        (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
        limit = connection._limit
        assert limit is not None
        writer.write(REQUEST[:9])
        writer.close()
        await until(lambda: not server.server_state.connections)
        assert limit.cancelled()


async def test_an_answer_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client sees nothing of an answer before it sees its head and its body."""
    app = App()
    app.refusing = False
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def between() -> None:
        begun.set()
        await go_on.wait()

    monkeypatch.setattr(app, "between", between)
    async with served(app) as (_, reader, writer):
        writer.write(REQUEST)
        await begun.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        go_on.set()
        assert await answer(reader) == b"ok"


@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
async def test_the_head_of_an_answer_without_a_body_arrives(connection: bytes) -> None:
    """HEAD is answered, on a connection that is kept and on one that is closed."""
    app = App()
    app.refusing = False
    async with served(app) as (_, reader, writer):
        writer.write(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: " + connection + b"\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_client_is_told_to_go_on_with_its_body() -> None:
    """ "100 Continue" arrives before there is anything of the answer."""

    class Reading(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive()).get("more_body"):
                pass
            await super().__call__(scope, receive, send)

    app = Reading()
    app.refusing = False
    async with served(app) as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert await answer(reader) == b"ok"


class Large(App):
    """Answers everything with what the system does not take at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        length = b"%d" % SIZE
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": bytes(SIZE)})


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def take(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")
    for _ in range(SIZE // 2**20):
        await reader.readexactly(2**20)


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test before has logged silences no line."""
    monkeypatch.setattr(http_protocol, "_log_seldom", RefusalLog().log_seldom)
    monkeypatch.setattr(http_protocol, "_log_malformed", RefusalLog().log_seldom)


both_loops = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": fast}) for fast in (True, False)], ids=["uvloop", "asyncio"]
)


@both_loops
@pytest.mark.parametrize(
    "request_", [REQUEST, REQUEST.replace(b"1.1", b"1.0")], ids=["a kept connection", "one that is closing"]
)
async def test_an_answer_that_nobody_takes_is_given_up(
    request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that reads nothing of its answer is cut off when its time is over, and the bytes are free."""
    room = Room(2 * SIZE)
    async with served(Large(), answer_timeout=0.2, answer_room=room) as (server, reader, writer):
        writer.write(request_)
        await until(lambda: room.taken > 0)
        assert SIZE // 2 < room.taken < SIZE
        await until(lambda: not server.server_state.connections)
        assert room.taken == 0
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await take(reader)
    assert "a connection is cut: its client did not take an answer within 0.2 s" in caplog.text


@both_loops
async def test_a_slow_client_gets_the_whole_answer() -> None:
    """Who takes an answer within its time gets it all, and the next one on the same connection too."""
    room = Room(2 * SIZE)
    async with served(Large(), answer_room=room) as (server, reader, writer):
        for _ in range(2):
            writer.write(REQUEST)
            await until(lambda: room.taken > 0)
            (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
            assert connection.timeout_keep_alive_task is None  # it does not idle yet
            await take(reader)
            await until(lambda: room.taken == 0)
            assert connection.timeout_keep_alive_task is not None


@both_loops
async def test_answers_that_nobody_takes_have_a_limit_together(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond it a connection is cut at once, and whoever waited before gets the whole answer."""
    room = Room(SIZE)
    async with served(Large(), answer_room=room) as (server, reader, writer):
        writer.write(REQUEST)
        await until(lambda: room.taken > 0)
        late_reader, late_writer = await connected(server)
        late_writer.write(REQUEST)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await take(late_reader)
        late_writer.close()
        await take(reader)
        await until(lambda: room.taken == 0)
    assert f"a connection is cut: request bodies of {SIZE} bytes" in caplog.text


async def test_an_answer_larger_than_the_limit_arrives_alone() -> None:
    """A small limit does not make a large answer impossible."""
    async with served(Large(), answer_room=Room(1024)) as (_, reader, writer):
        for _ in range(2):
            writer.write(REQUEST)
            await take(reader)


@both_loops
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_waits_for_the_answer_before_it(at_once: bool) -> None:
    """The answer to a next request is not even made while the one before waits for the client."""
    app, room = Large(), Room(2 * SIZE)
    async with served(app, answer_room=room) as (_, reader, writer):
        writer.write(REQUEST * (2 if at_once else 1))
        await until(lambda: room.taken > 0)
        if not at_once:
            writer.write(REQUEST)
        await asyncio.sleep(0.1)
        assert app.requests == 1
        await take(reader)
        await take(reader)
        assert app.requests == 2


async def test_what_waits_behind_an_answer_is_read_at_a_stop() -> None:
    """A request that came while the answer before it was not taken yet is answered before the end."""
    app, room = Large(), Room(2 * SIZE)
    async with served(app, answer_room=room) as (server, reader, writer):
        writer.write(REQUEST)
        await until(lambda: room.taken > 0)
        writer.write(REQUEST)
        await asyncio.sleep(0.1)
        (connection,) = cast("set[LimitedProtocol]", server.server_state.connections)
        connection.read_on()
        await until(lambda: app.requests == 2)
        await take(reader)
        await take(reader)


class Echo(App):
    """Answers with how long the body is, in two digits."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: dict[bytes, bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        self.headers = dict(scope["headers"])
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"%02d" % size})


OFFERS = (b"POST / HTTP/1.1", b"Host: x", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABk")
MEASURED = b"Content-Length: 5\r\n\r\nhello"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"


@pytest.mark.parametrize("pause", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("body", [MEASURED, CHUNKED], ids=["measured", "in chunks"])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
async def test_an_offered_upgrade_is_ignored(
    protocol: bytes, body: bytes, pause: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that offers another protocol is read, with its body, as if it did not; and so is the next."""
    app = Echo()
    request = b"\r\n".join((*OFFERS, b"Upgrade: " + protocol, body))
    async with served(app) as (_, reader, writer):
        for sent in (request, request, b"POST / HTTP/1.1\r\nHost: x\r\n" + body):
            for part in [bytes([byte]) for byte in sent] if pause else [sent]:
                writer.write(part)
                if pause:
                    await asyncio.sleep(0)
            assert await answer(reader) == b"05"
            assert b"upgrade" not in app.headers
        writer.write(3 * request + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [await answer(reader) for _ in range(4)] == [b"05", b"05", b"05", b"00"]
    assert caplog.messages == []


@pytest.mark.parametrize("offer", [b"", b"Connection: Upgrade \r\nUpgrade: h2c \r\n"], ids=["plain", "offer"])
async def test_blanks_around_a_header_value_are_no_part_of_it(offer: bytes) -> None:
    """Nothing but the value reaches the application, and a client that waits to send its body is told to."""
    app = Echo()
    async with served(app) as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nExpect:100-Continue \r\nContent-Length: 5 \r\n" + offer)
        writer.write(b"A: \t a b \t \r\nB: \r\n\r\n")
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"hello")
        assert await answer(reader) == b"05"
    assert (app.headers[b"a"], app.headers[b"b"]) == (b"a b", b"")
    assert app.headers[b"content-length"] == b"5"


@pytest.mark.parametrize("last", [b"HTTP/1.0\r\n", b"HTTP/1.1\r\nConnection: close\r\n"])
async def test_an_upgrade_may_be_offered_with_the_last_request(last: bytes) -> None:
    """After its answer the connection is closed, and what follows is thrown away as ever."""
    app = Echo()
    async with served(app) as (_, reader, writer):
        offer = b"POST / " + last + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + MEASURED
        writer.write(offer + REQUEST)
        assert await answer(reader) == b"05"
        assert await reader.read() == b""
    assert app.requests == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n",  # after which nothing would be HTTP any more
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
    ids=["tunnel", "unknown method", "TLS"],
)
async def test_what_is_no_request_is_refused_and_counted(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A flood of it counts, and is one line a second with the address of a client."""
    app = Echo()
    counted: list[None] = []
    async with served(app, malformed=lambda: counted.append(None)) as (server, _, _):
        for number in range(1, 21):
            reader, writer = await connected(server)
            writer.write(sent)
            assert (await reader.readline()).startswith(b"HTTP/1.1 400")
            await reader.read()
            assert len(counted) == number
            writer.close()
    assert app.requests == 0
    assert "127.0.0.1 sent what cannot be read as an HTTP request" in caplog.messages[0]
    assert len(caplog.messages) < 20


@pytest.mark.parametrize("waiting", [0, 2])
async def test_what_is_no_request_takes_no_answer_away(waiting: int) -> None:
    """Whole requests before it are answered, the last with the connection's end; it counts by itself."""
    app = App()
    app.refusing = False
    app.go_on.clear()
    counted: list[None] = []
    async with served(app, malformed=lambda: counted.append(None)) as (_, reader, writer):
        writer.write((1 + waiting) * REQUEST + b"\x16\x03\x01\x02")
        await until(lambda: app.requests == 1)
        app.go_on.set()
        answers = (await reader.read()).split(b"ok")
    assert [each.startswith(b"HTTP/1.1 200") for each in answers] == [True] * (1 + waiting) + [False]
    assert [b"connection: close" in each for each in answers] == [False] * waiting + [True, False]
    assert answers[-1] == b""
    assert counted == [None]


@pytest.mark.parametrize("size", [4, 2 * http_protocol.MAX_HEAD])
async def test_what_is_no_request_ends_a_connection_on_which_one_is_answered(size: int) -> None:
    """The same of what comes while the request before it is answered, however much it is."""
    app = App()
    app.refusing = False
    app.go_on.clear()
    counted: list[None] = []
    async with served(app, malformed=lambda: counted.append(None)) as (_, reader, writer):
        writer.write(REQUEST)
        await until(lambda: app.requests == 1)
        writer.write(b"\x16" * size)
        await until(lambda: bool(counted))
        writer.write(bytes(4 * http_protocol.MAX_HEAD))
        await writer.drain()
        await asyncio.sleep(0.1)
        app.go_on.set()
        answered = await reader.read()
    assert answered.startswith(b"HTTP/1.1 200")
    assert answered.endswith(b"ok")
    assert counted == [None]


async def test_a_request_that_breaks_off_behind_another_takes_no_answer_away() -> None:
    """The whole one is answered; the broken one is not begun."""
    app = App()
    app.refusing = False
    async with served(app) as (_, reader, writer):
        writer.write(REQUEST + b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")
        answered = await reader.read()
    assert answered.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answered
    assert answered.endswith(b"ok")
    assert app.requests == 1


async def test_nothing_is_written_into_an_answer() -> None:
    """The refusal of a body that breaks off is no part of an answer that has begun before."""

    class Early(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            head = [(b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass

    async with served(Early()) as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"part")
        writer.write(b"no chunk\r\n")
        assert await reader.read() == b""


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip,chunked"])
async def test_only_chunks_are_taken_as_a_transfer_coding(coding: bytes) -> None:
    """A body in another one is refused, and not read as if it had none (RFC 9112, 6.1)."""
    app = Echo()
    async with served(app) as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n")
        refusal = await reader.read()
        assert refusal.startswith(b"HTTP/1.1 400")
        assert refusal.endswith(b"The only transfer coding that is taken is: chunked.")
    assert app.requests == 0


async def test_a_request_that_breaks_off_counts_once() -> None:
    """One whose body is wrong has reached the application, and counts there."""

    class Reading(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.requests += 1
            while (await receive())["type"] != "http.disconnect":
                pass

    app = Reading()
    counted: list[None] = []
    async with served(app, malformed=lambda: counted.append(None)) as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await until(lambda: app.requests == 1)
        writer.write(b"no chunk\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        await reader.read()
    assert counted == []


async def test_a_method_for_tunnels_is_one_like_others(caplog: pytest.LogCaptureFixture) -> None:
    """CONNECT with a path reaches the application, which has it in no route, and is no line of its own."""
    app = Echo()
    async with served(app) as (_, reader, writer):
        writer.write(b"CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await answer(reader) == b"00"
    assert app.requests == 1
    assert caplog.messages == []
