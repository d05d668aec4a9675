"""What the log says of requests that the service is unable to answer."""

import logging
import time
from collections.abc import Callable

from service.errors import Overloaded, UnableToAnswer

logger = logging.getLogger(__name__)


class RefusalLog:
    """A line for each, but of refusals one a second: in an overload, writing them would cost the most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = -1.0  # when there may be a line about an overload again
        self._silent = 0

    def log(self, error: UnableToAnswer) -> None:
        text = f"{error.title}: {error.detail}"
        if isinstance(error, Overloaded):
            self.log_seldom(text)
        else:
            logger.warning("%s", text)

    def log_seldom(self, text: str) -> None:
        """A line of what may come in floods, or none."""
        now = self._clock()
        if now < self._next:
            self._silent += 1
            return
        logger.warning("%s (%d more since the last such line)", text, self._silent)
        self._next = now + 1
        self._silent = 0


log_refusal = RefusalLog().log
