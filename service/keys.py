"""API keys, compared in constant time; for HTTP and gRPC alike."""

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from pydantic import SecretStr


class KeyRing:
    """The API keys that are valid now; without any, everybody may call."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value().encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether `Authorization: Bearer` or `X-API-Key` among these (name, value) holds a valid key.

        Names are in lower case, as in ASGI and in gRPC's metadata. Takes as long for a key that is nearly
        right as for any other.
        """
        given = []
        for name, value in headers:
            if name == b"x-api-key":
                given.append(value)
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                given.append(value[7:].strip())
        found = [hmac.compare_digest(_digest(key), valid) for key in given for valid in self._digests]
        return any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
