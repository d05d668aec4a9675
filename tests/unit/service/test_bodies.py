"""Headers as the caller sent them."""

import random

from fastapi import Request
from starlette.datastructures import Headers

from service.bodies import first_header, list_header

NAMES = (b"accept", b"content-type", b"x")
VALUES = (b"", b"a", b"a, b", "\u00e9".encode("latin-1"), b" c")


def test_headers_are_found_as_starlette_finds_them() -> None:
    """Of several lines the first counts, or all where the header is a list; an absent one has a default."""
    chance = random.Random(0)  # noqa: S311 - no secret
    for _ in range(1000):
        lines = [(chance.choice(NAMES), chance.choice(VALUES)) for _ in range(chance.randrange(5))]
        request, headers = Request({"type": "http", "headers": lines}), Headers(raw=lines)
        for name in NAMES:
            assert first_header(request, name, "none") == headers.get(name.decode(), "none")
            found = headers.getlist(name.decode()) or ["none"]
            assert list_header(request, name, "none") == ", ".join(found)
