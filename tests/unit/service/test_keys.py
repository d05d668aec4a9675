"""Which headers hold a valid API key."""

import pytest
from pydantic import SecretStr

from service.keys import KeyRing

RING = KeyRing([SecretStr("old-key-old-key-1"), SecretStr("new-key-new-key-2")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-api-key", b"old-key-old-key-1"),
        (b"x-api-key", b"new-key-new-key-2"),
        (b"authorization", b"Bearer new-key-new-key-2"),
        (b"authorization", b"bearer  old-key-old-key-1"),
    ],
)
def test_any_valid_key_is_admitted(name: bytes, value: bytes) -> None:
    """While keys are exchanged the old and the new one work, in either header."""
    assert RING.admits([(b"host", b"x"), (name, value)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-api-key", b""),
        (b"x-api-key", b"old-key-old-key-"),
        (b"x-api-key", b"old-key-old-key-11"),
        (b"x-api-key", b"\xff\xfe"),
        (b"x-api-key", b"Bearer old-key-old-key-1"),
        (b"authorization", b"old-key-old-key-1"),
        (b"authorization", b"Basic old-key-old-key-1"),
        (b"cookie", b"old-key-old-key-1"),
    ],
)
def test_nothing_else_is(name: bytes, value: bytes) -> None:
    """A part of a key, more than a key, another scheme or another header does not do."""
    assert not RING.admits([(name, value)])


def test_a_valid_key_beside_another_is_admitted() -> None:
    """A proxy's own Authorization does not stand in the way of X-API-Key."""
    assert RING.admits([(b"authorization", b"Bearer proxy"), (b"x-api-key", b"old-key-old-key-1")])


def test_an_empty_ring_is_false() -> None:
    """Without keys there is nothing to check."""
    assert not KeyRing([])
