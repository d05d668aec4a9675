"""Request bodies and queries: read within limits, parsed into the forms of `schemas`."""

import asyncio
import json
import re
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import cache
from typing import ParamSpec, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.context import WHOLE
from service.errors import (
    BodyTimeout,
    InvalidInput,
    MalformedBody,
    NotAcceptable,
    TooLarge,
    UnsupportedMediaType,
)
from service.room import Share
from service.settings import Settings

JSON = "application/json"
MULTIPART = "multipart/form-data"
NPY = "application/x-npy"
NPZ = "application/x-npz"
PNG = "image/png"

_SMALL_BODY = 32 * 1024  # bytes; parsing more would hold up the event loop

# A JSON text has at most one more value than commas in each container, and each container an opening
# bracket: all these marks together bound what parsing takes. Commas alone bound no nesting. By the usual
# limits the largest honest body, 1,024 data URLs with two commas each, stays far below.
MAX_MARKS = 32_768

# Of which a form has six at most. Each of thousands would be looked up and become an error.
_MAX_PARAMETERS = 64

# multipart/form-data has no such parameter (RFC 7578, 8). Starlette would decode names and texts with it, and
# some of Python's codecs raise what it does not catch, or take a time that grows with the square of a text.
_CHARSET = re.compile(r"charset\s*=", re.IGNORECASE)

# Bytes that a form may have beside its contents, and more for each file that there may be: these are taken
# apart in Python, a microsecond each. Browsers take 150 and the file's name, which may have 255, or three
# times that with percent signs.
_FRAME = 8192
_PART_FRAME = 1024

# Pydantic's names of errors in a name, and our words for them.
_NAME_ERRORS = {"extra_forbidden": "there is no such field", "missing": "it is missing"}

Part = bytes | str
"""A file's content, or the text of a part without a file name."""
Parts = dict[str, list[Part]]

AnyPart = TypeVar("AnyPart", bound=Part)
Form = TypeVar("Form", bound=BaseModel)
Result = TypeVar("Result")
P = ParamSpec("P")


def media_type(request: Request, taken: Sequence[str]) -> str:
    """The body's media type, if it is one of those taken here.

    Raises:
        UnsupportedMediaType: it is another, or not given.
    """
    found = first_header(request, b"content-type", "").partition(";")[0].strip().lower()
    if found not in taken:
        raise UnsupportedMediaType(
            "This kind of body is not taken here.",
            received=found[:100] or "no Content-Type",
            expected=" or ".join(taken),
        )
    return found


def accepted(request: Request, offered: Sequence[str]) -> str:
    """The offered media type that the caller likes best; of equals the first offered.

    Raises:
        NotAcceptable: the caller accepts none of them.
    """
    header = list_header(request, b"accept", "*/*")
    if header == "*/*":
        return offered[0]
    ranges = [_media_range(entry) for entry in header.split(",")[:100]]

    def liking(media: str) -> float:
        matching = [(len(name), q) for name, q in ranges if _matches(name, media)]
        return max(matching)[1] if matching else 0.0  # the most specific range decides

    best = max(offered, key=liking)
    if liking(best) <= 0:
        raise NotAcceptable(
            "None of the forms of this answer is accepted.",
            received=f"Accept: {header[:100]}",
            expected=" or ".join(offered),
        )
    return best


def _media_range(entry: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in entry.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return name, float(parameter[2:])
            except ValueError:
                return name, 0.0
    return name, 1.0


def _matches(name: str, media: str) -> bool:
    return name in ("*/*", media) or (name.endswith("/*") and media.startswith(name[:-1]))


async def read_body(
    request: Request, settings: Settings, share: Share, *, may_be_empty: bool = False
) -> bytes:
    """The whole body, decompressed if it came compressed; it never takes more memory than the limit.

    Args:
        share: counts the bytes that are held, for as long as the caller keeps the body.

    Raises:
        Overloaded: all bodies together would be over their limit.
        TooLarge: by its Content-Length, or as soon as more has arrived or been decompressed.
        BodyTimeout: not complete in time.
        MalformedBody: empty, where it may not be, or not compressed as it says.
        UnsupportedMediaType: compressed in another way than ours.
    """
    limit = settings.max_body
    length = first_header(request, b"content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _body_too_large(f"{length[:20]} bytes", limit)
    body = bytearray()
    try:
        if WHOLE in request.scope.get("state", ()):  # a time limit would cost more than all the rest
            await _receive_into(body, request, limit, share)
        else:
            async with asyncio.timeout(settings.body_timeout):
                await _receive_into(body, request, limit, share)
        content = bytes(body)
    except TimeoutError as error:
        raise BodyTimeout(
            "The body did not arrive in time.",
            received=f"{len(body)} bytes in {settings.body_timeout:g} s",
            expected=f"the whole body within {settings.body_timeout:g} s",
        ) from error
    finally:
        body.clear()  # an error's traceback holds it for as long as the rest is thrown away
    # Empty members of a list say nothing (RFC 9110, 5.6.1).
    encoding = list_header(request, b"content-encoding", "").strip(", \t").lower() or "identity"
    if content and encoding != "identity":
        # Counted when it is there: before, at most a limit's bytes for each of asyncio's threads.
        content = await asyncio.to_thread(inflate, content, encoding, limit)
        share.resize(len(content))
    if not content and not may_be_empty:
        raise MalformedBody("The body is empty.", received="0 bytes", expected="a body as /docs describes it")
    return content


async def _receive_into(body: bytearray, request: Request, limit: int, share: Share) -> None:
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > limit:
            raise _body_too_large(f"more than {limit} bytes", limit)
        share.resize(len(body) + len(chunk))
        body += chunk
        more = message.get("more_body", False)


# Starlette's view of the headers takes five calls for each look-up.


def first_header(request: Request, name: bytes, absent: str) -> str:
    """The first line of a header, `name` in lower case."""
    headers: list[tuple[bytes, bytes]] = request.scope["headers"]
    for found, value in headers:
        if found == name:
            return value.decode("latin-1")
    return absent


def list_header(request: Request, name: bytes, absent: str) -> str:
    """A header that is a list, `name` in lower case; it may come in several lines (RFC 9110, 5.3)."""
    lines = [value.decode("latin-1") for found, value in request.scope["headers"] if found == name]
    return ", ".join(lines) if lines else absent


def _body_too_large(received: str, limit: int) -> TooLarge:
    return TooLarge("The body is too large.", received=received, expected=f"at most {limit} bytes")


# By the window size zlib tells the two forms apart; HTTP's `deflate` is zlib's form (RFC 9110, 8.4.1.2).
# `x-gzip` is an old name (8.4.1.3).
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS}

# Members that gzip may have in series (RFC 1952, 2.2), as bgzip makes one of each 64 KiB. Each costs 10 us,
# and a copy of what is left of the piece that it ends in.
_MEMBER = b"\x1f\x8b"
_MAX_MEMBERS = 4096
_MEMBER_PIECE = 32 * 1024  # bytes


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """A compressed body's content, which never takes more memory than the limit.

    Raises:
        UnsupportedMediaType: compressed in another way.
        MalformedBody: not whole, or not compressed in that way.
        TooLarge: more than `limit` bytes come out, or it has more members than any honest one.
    """
    if encoding not in _WINDOWS:
        raise UnsupportedMediaType(
            "This compression is not taken here.",
            received=f"Content-Encoding: {encoding[:50]}",
            expected=" or ".join(_WINDOWS),
        )
    parts: list[bytes] = []
    room = limit + 1
    rest = memoryview(body)
    piece = len(body)  # so that a single member, as nearly all are, is not put together from parts
    for _ in range(_MAX_MEMBERS):
        inflater = zlib.decompressobj(_WINDOWS[encoding])
        while rest and not inflater.eof:
            given = rest[:piece]
            try:
                parts.append(inflater.decompress(given, room))
            except zlib.error as error:
                raise MalformedBody(
                    "The body cannot be decompressed.", received=str(error), expected=f"a {encoding} body"
                ) from error
            room -= len(parts[-1])
            if not room:
                raise _body_too_large(f"more than {limit} bytes after decompression", limit)
            rest = rest[len(given) - len(inflater.unused_data) :]
        if encoding == "deflate" or rest[:2] != _MEMBER:
            break
        piece = _MEMBER_PIECE
    else:
        raise TooLarge(
            "The body has too many gzip members.",
            received=f"more than {_MAX_MEMBERS}",
            expected=f"at most {_MAX_MEMBERS}",
        )
    if encoding != "deflate" and not bytes(rest).strip(b"\0"):
        rest = rest[:0]  # some tools fill up with zeros, which gzip itself leaves out
    if not inflater.eof or rest:
        raise MalformedBody(
            "The body cannot be decompressed.",
            received="bytes after the end of the stream" if inflater.eof else "an incomplete stream",
            expected=f"a whole {encoding} body",
        )
    return b"".join(parts)


async def aside(size: int, parse: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Parse a body of `size` bytes: a small one at once, another on a thread."""
    if size <= _SMALL_BODY:
        return parse(*args, **kwargs)
    return await asyncio.to_thread(parse, *args, **kwargs)


def parse_json(
    form: type[Form], text: bytes | str, *, where: str = "body", max_marks: int = MAX_MARKS
) -> Form:
    """Parse and validate a JSON text.

    Args:
        where: what errors call it.
        max_marks: how many commas and opening brackets the text may have.

    Raises:
        MalformedBody: not JSON.
        InvalidInput: JSON of another form; says where, what was found and what was expected.
        TooLarge: more values than any honest body has.
    """
    content = text.encode() if isinstance(text, str) else text
    if sum(map(content.count, (b",", b"[", b"{"))) > max_marks:
        raise TooLarge(
            "The JSON text has too many values.",
            received=f"more than {max_marks} commas and opening brackets",
            expected=f"at most {max_marks}; large arrays travel as bytes",
        )
    try:
        return form.model_validate_json(content)
    except ValidationError as error:
        raise _explain(error, form, where) from error


def parse_query(form: type[Form], request: Request) -> Form:
    """Validate the query parameters.

    Raises:
        InvalidInput: an unknown name, one given twice, a value out of range, or far too many.
    """
    query: bytes = request.scope["query_string"]
    if not query:
        defaults: Form = _defaults(form)
        return defaults
    if query.count(b"&") >= _MAX_PARAMETERS:
        raise InvalidInput(
            "There are too many query parameters.",
            received=f"more than {_MAX_PARAMETERS}",
            expected=f"at most {_MAX_PARAMETERS}",
        )
    items = request.query_params.multi_items()
    values = dict(items)
    if len(values) != len(items):
        twice = sorted(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        raise InvalidInput(
            "A query parameter is given twice.", received=", ".join(twice)[:100], expected="each name once"
        )
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise _explain(error, form, "query") from error


@cache
def _defaults(form: type[Form]) -> Form:
    return form()


def _explain(error: ValidationError, form: type[BaseModel], where: str) -> MalformedBody | InvalidInput:
    errors = error.errors(include_url=False)
    # A field by another name is the reason why one is missing.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return MalformedBody(f"The {where} is not JSON.", received=message, expected="a JSON text (RFC 8259)")
    received = "nothing" if first["type"] == "missing" else json.dumps(first["input"], default=str)[:100]
    expected = message
    if first["type"] in _NAME_ERRORS:
        message = _NAME_ERRORS[first["type"]]
        if len(first["loc"]) == 1:  # not within a value, whose form is another
            expected = f"fields among {', '.join(_names(form))}"
    elif first["type"] == "bool_type":
        expected = "true or false"
    place = " ".join([where, ".".join(str(part)[:50] for part in first["loc"])]).rstrip()
    return InvalidInput(f"{place}: {message}", received=received, expected=expected)


def _names(form: type[BaseModel]) -> list[str]:
    """What the fields are called in JSON."""
    return [field.alias or name for name, field in form.model_fields.items()]


class _Parser(MultiPartParser):
    spool_max_size = 1 << 62  # the body is already in memory; nothing goes to disk
    ended = False
    """Whether the closing boundary has come: without it a part may be missing."""
    max_frame: int
    """Bytes that there may be beside the parts' contents: headers, boundaries and spaces."""
    content = 0
    """Bytes of contents so far."""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        if end - self.content > self.max_frame:  # of `data`, which is the whole body
            raise MultiPartException(
                f"Too many bytes beside the contents. Maximum number of bytes is {self.max_frame}."
            )
        super().on_header_field(data, start, end)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.content += end - start
        super().on_part_data(data, start, end)

    def on_end(self) -> None:
        self.ended = True


def parse_multipart(request: Request, body: bytes, names: Sequence[str], max_files: int) -> Parts:
    """The parts of a multipart body by name, in order; files stay in memory.

    Args:
        names: the parts that are taken.
        max_files: how many files, and how many texts, there may be.

    Raises:
        MalformedBody: not well formed.
        TooLarge: more parts than may be, or more beside their contents.
        InvalidInput: a part that nobody asked for.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        if not parser.ended:  # said here, where the parser closes its files
            raise MultiPartException("no closing boundary, which has two hyphens behind it")

    kind = _CHARSET.sub("ignored=", request.headers["content-type"])
    headers = Headers({"content-type": kind})
    parser = _Parser(headers, stream(), max_files=max_files, max_fields=max_files, max_part_size=len(body))
    parser.max_frame = _FRAME + _PART_FRAME * max_files
    try:
        boundary = parse_options_header(kind)[1].get(b"boundary", b"")
        if body.count(b"\r\n--" + boundary) > 2 * max_files + 1:  # files, texts and the end
            raise MultiPartException("Too many boundaries.")
        form = _result(parser.parse())
    except MultiPartException as error:
        fault = TooLarge if error.message.startswith("Too many") else MalformedBody
        raise fault(
            "The multipart body cannot be parsed.",
            received=error.message,
            expected=f"multipart/form-data (RFC 7578) with at most {max_files} files",
        ) from error
    parts: Parts = {}
    for name, part in form.multi_items():
        if isinstance(part, str):
            parts.setdefault(name, []).append(part)
        else:
            with part.file as file:
                parts.setdefault(name, []).append(file.read())
    unknown = parts.keys() - set(names)
    if unknown:
        raise InvalidInput(
            "The form has parts that are not taken here.",
            received=", ".join(sorted(unknown))[:100],
            expected=" and ".join(names),
        )
    return parts


def _result(work: Coroutine[None, None, Result]) -> Result:
    """What comes of asynchronous work that never waits, as parsing in memory does."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast("Result", end.value)
    raise RuntimeError("it waited")


def file_parts(parts: Parts, name: str) -> list[bytes]:
    """The contents of all file parts with this name, in order.

    Raises:
        InvalidInput: there is none, or one without a file name.
    """
    contents = []
    for part in parts.get(name, []):
        if isinstance(part, str):
            raise InvalidInput(
                f"The part {name!r} is not a file.", received="a part without a filename", expected="a file"
            )
        contents.append(part)
    if not contents:
        raise InvalidInput(
            f"There is no part named {name!r}.",
            received=", ".join(parts)[:100] or "no parts",
            expected=f"a file part named {name!r}",
        )
    return contents


def only_part(parts: Sequence[AnyPart], name: str) -> AnyPart:
    """The one part of a name that may come once.

    Raises:
        InvalidInput: there are several.
    """
    if len(parts) > 1:
        raise InvalidInput(
            f"There are several parts named {name!r}.", received=str(len(parts)), expected="one"
        )
    return parts[0]
