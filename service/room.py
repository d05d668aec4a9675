"""How many bytes of request bodies there may be at a time, all requests together; and of answers."""

from service.errors import Overloaded


class Room:
    """Room for the bodies of all requests, or of what else is named. Belongs to one event loop."""

    def __init__(self, size: int, holds: str = "request bodies") -> None:
        self.size = size
        self.holds = holds
        self.taken = 0


class Share:
    """One body's part of the room, given back at the end of its `with`, however that ends."""

    __slots__ = ("_room", "_taken")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._taken = 0

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_: object) -> None:
        self._room.taken -= self._taken

    def resize(self, size: int) -> None:
        """Take as many bytes, in place of those that are taken.

        Raises:
            Overloaded: the room has not so many left.
        """
        room = self._room
        taken = room.taken - self._taken + size
        if taken > room.size:
            raise Overloaded(f"{room.holds} of {room.size} bytes at most are held at a time", retry_after=1)
        room.taken = taken
        self._taken = size
