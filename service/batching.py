"""Dynamic batching: a batch is of what waits when the device has room.

The event loop admits items and receives answers; one thread per batcher forms batches and runs them.
Who was read together may leave together: not before the event loop has handed over all of them.
The thread takes its next batch itself once the last one has ended: at once where there are many callers,
and when those are back who were answered where there are few. See docs/decisions/0010.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.context import Stage, add_stages, begin_record
from service.errors import InferenceFailed, Overloaded, ShuttingDown
from service.metrics import QueueMetrics

logger = logging.getLogger(__name__)

Arrays = tuple[NDArray[Any], ...]
"""Arrays that share their first axis: one row for each image or capsule set."""


FEW = 8
"""On a CPU a graph gains little from more rows."""
FEW_ON_ONE = 32
"""Where graph and event loop have one processor between them, so that neither works while the other does."""
_QUIET = 1 / 8  # of the last run's time: if nobody comes for so long, nobody else is waited for
_LONGEST_QUIET = 0.05  # seconds, after a run that was held up
_PATIENCE = 1 / 2  # of the last run's time: a longer wait costs more than it saves
_IN_VAIN = 3  # waits in a row that were too long, after which it is not tried for a while
_IN_TURNS = 255  # batches

# One or two may be a passing lack of memory.
_MOST_FAILURES = 2  # runs in a row


@dataclass(eq=False, slots=True)
class _Item:
    """One caller's rows."""

    inputs: Arrays
    rows: int
    answer: asyncio.Future[Arrays]
    submitted: float  # seconds of time.perf_counter, as `started`
    started: float = 0.0  # when its first rows left for the device
    taken: int = 0  # rows handed to the device
    stages: list[Stage] = field(default_factory=list)  # of the batches that carried it
    parts: list[Arrays] = field(default_factory=list)  # outputs of the rows that came back, in order


class _Slice(NamedTuple):
    """The rows of one item that travel in one batch; a large item travels in several."""

    item: _Item
    start: int
    stop: int


class Batcher:
    """Groups waiting items into batches of at most `max_batch` rows and runs them on a thread of its own.

    `run` maps input arrays of B rows to output arrays of B rows. It must be safe to call from another
    thread; inputs are validated before they get here, so that no item can spoil its neighbours. The
    stages that `run` measures are added to the record of every request in the batch.
    Belongs to the event loop it was made on.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Arrays], Arrays],
        *,
        max_batch: int,
        queue_length: int,
        metrics: QueueMetrics,
        few: int = FEW,
    ) -> None:
        """Start the thread.

        Args:
            few: rows up to which all callers run in one batch: as many as are computed for the price of one.
        """
        self.name = name
        self._run = run
        self._metrics = metrics
        self._max_batch = max_batch
        self._queue_length = queue_length
        self._few = min(few, max_batch)
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # guards the fields below, down to `_in_turns`
        self._changed = threading.Condition(self._lock)  # whose own `with` is written in Python
        self._waiting: deque[_Item] = deque()
        self._depth = 0
        self._running: list[_Slice] = []
        self._ripe = False  # whether the loop has handed over all who were read with the first who waits
        self._closing = False
        self._together = False  # whether the next batch waits for the callers of the one that has ended
        self._expected = 0  # of these, those who are not back
        self._deadline = 0.0  # when waiting for them has cost more than it saves
        self._in_vain = 0  # waits in a row that cost more than they saved
        self._in_turns = 0  # batches that will not wait
        self._began: float | None = None  # when the run that is under way did; set by the thread alone
        self._failures = 0  # runs that failed since one succeeded; set by the thread alone
        self._seconds_per_row = 0.0  # moving average, for Retry-After
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Rows that wait for the device; of a large item only those of its next turn."""
        return self._depth

    def works(self, limit: float) -> bool:
        """Whether answers can be expected: not after runs that failed, nor `limit` seconds into one."""
        began = self._began
        hangs = began is not None and time.perf_counter() - began > limit
        return self._failures <= _MOST_FAILURES and not hangs

    async def submit(self, *inputs: NDArray[Any]) -> Arrays:
        """Run `inputs` (each with R rows) together with whatever else is waiting; R output rows.

        An item larger than a batch takes turns with the others, a batch's rows each time, and occupies the
        queue only with those: it can neither hold up its neighbours nor be too large to be admitted.

        Raises:
            Overloaded: at once, when the queue has no room for R more rows.
            ShuttingDown: the batcher is closed, or closed before the item's turn came.
            InferenceFailed: the batch that carried the item failed.
        """
        item = _Item(inputs, len(inputs[0]), self._loop.create_future(), time.perf_counter())
        weight = self._weight(item)
        with self._lock:
            if self._closing:
                raise ShuttingDown(f"{self.name} takes no more work")
            self._require_room(weight)
            if not self._waiting:
                self._ripe = False
                self._loop.call_soon(self._ripen)
            self._waiting.append(item)
            self._depth += weight
            self._metrics.depth.set(self._depth)
            full = self._depth >= self._max_batch
            if self._expected:
                self._expected -= 1
                if not self._expected:
                    self._learn(paid=item.submitted <= self._deadline)
                elif full:
                    self._expected = 0
            self._ripe = self._ripe or full
            if self._ripe and not self._expected:
                self._changed.notify()
        try:
            return await item.answer
        finally:
            if item.taken < item.rows:  # the caller left, or an earlier part failed
                self._withdraw(item)
            if item.taken:
                add_stages((Stage("queue", item.submitted, item.started), *item.stages))
            del item  # or it, its answer's error and this frame would keep one another and the inputs

    def _ripen(self) -> None:
        """Let a batch leave; behind all that the event loop does in the turn in which the first came."""
        with self._lock:
            self._ripe = True
            if not self._expected:
                self._changed.notify()

    def require_room(self) -> None:
        """Refuse early what `submit` would refuse, before anything is spent on it.

        Raises:
            Overloaded: the queue has no room for a single row.
        """
        self._require_room(1)

    def _require_room(self, rows: int) -> None:
        if self._depth + rows > self._queue_length:
            raise Overloaded(
                f"{self._depth} rows wait for {self.name}, whose queue holds {self._queue_length}: "
                f"no room for {rows} more",
                retry_after=max(1, math.ceil(self._depth * self._seconds_per_row)),
            )

    async def close(self, limit: float) -> None:
        """Refuse new items, finish those that wait within `limit` seconds, and fail the rest.

        Every caller has an answer when this returns. A run that outlasts the limit ends by itself; its
        outputs go nowhere.
        """
        with self._lock:
            self._closing = True
            self._changed.notify()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), limit)
        with self._lock:
            left = {*self._waiting, *(part.item for part in self._running)}
            self._waiting.clear()
            self._depth = 0
            self._metrics.depth.set(0)
        for item in left:
            if not item.answer.done():
                item.answer.set_exception(ShuttingDown(f"{self.name} closed before this request's turn"))

    def _withdraw(self, item: _Item) -> None:
        with self._lock, contextlib.suppress(ValueError):  # not there: every row is with the device
            self._waiting.remove(item)
            self._depth -= self._weight(item)
            self._metrics.depth.set(self._depth)

    def _weight(self, item: _Item) -> int:
        return min(item.rows - item.taken, self._max_batch)

    # What follows up to `_deliver` runs on the thread.

    def _work(self) -> None:
        while batch := self._take():
            started = self._began = time.perf_counter()
            stages = begin_record()
            try:
                outputs = self._run(_gather(batch))
                self._failures = 0
            except Exception:
                self._failures += 1
                logger.exception("%s: a batch of %d items failed", self.name, len(batch))
                self._metrics.failures.inc()
                outputs = None
            self._began = None
            seconds = time.perf_counter() - started
            if outputs is not None:
                self._expect_callers_of(batch, seconds)
            self._call_loop(self._deliver, batch, outputs, stages, seconds)
        self._call_loop(self._stopped.set)

    def _expect_callers_of(self, ended: list[_Slice], seconds: float) -> None:
        """Make the next batch wait for the callers of this one, if it would be a small one without them."""
        with self._lock:
            small = self._depth + _rows(ended) <= self._few
            self._together = small and not self._in_turns
            self._in_turns = max(0, self._in_turns - 1)
            answered = sum(not part.item.answer.done() for part in ended)
            if self._together and self._depth + answered > 1:  # whoever comes first goes first
                self._expected = answered
                self._deadline = time.perf_counter() + _PATIENCE * seconds

    def _take(self) -> list[_Slice]:
        """The next batch, as soon as there is one; empty when the batcher is closed and drained.

        Callers who are answered come back. Few of them run together, all that wait in one batch. Of many,
        counting the rows that wait and those of the batch that has just ended, it takes about half: while
        the device runs these, the event loop answers and reads the others.
        """
        batch: list[_Slice] = []
        with self._lock:
            while (self._expected or not self._ripe or not self._waiting) and not self._closing:
                self._changed.wait()
            ended = _rows(self._running)
            room = self._max_batch
            spare = 0 if self._together else max(0, room - math.ceil((self._depth + ended) / 2))
            now = time.perf_counter()
            while self._waiting and room > spare:
                item = self._waiting.popleft()
                item.started = item.started or now
                self._depth -= self._weight(item)
                part = _Slice(item, item.taken, min(item.rows, item.taken + room))
                item.taken = part.stop
                room -= part.stop - part.start
                batch.append(part)
                if item.taken < item.rows:
                    self._depth += self._weight(item)
                    if item.rows > self._max_batch:
                        self._waiting.append(item)
                    else:
                        self._waiting.appendleft(item)
            self._running = batch
            self._ripe = bool(self._waiting)
            self._metrics.depth.set(self._depth)
        return batch

    def _call_loop(self, function: Callable[..., None], *arguments: object) -> None:
        # Closed only after `close()` gave up on this run: nobody is left to hear of it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(
        self, batch: list[_Slice], outputs: Arrays | None, stages: list[Stage], seconds: float
    ) -> None:
        """Scatter a batch's outputs by row, on the event loop."""
        rows = _rows(batch)
        self._seconds_per_row += 0.2 * (seconds / rows - self._seconds_per_row)
        offset = 0
        for item, start, stop in batch:
            first, offset = offset, offset + stop - start
            if item.answer.done():
                continue
            if outputs is None:
                item.answer.set_exception(InferenceFailed(f"the batch in {self.name} failed; see the log"))
                continue
            item.stages += stages
            item.parts.append(tuple([output[first:offset] for output in outputs]))
            if stop == item.rows:
                item.answer.set_result(_join(item.parts))
        # Behind those who have their answers now.
        self._loop.call_soon(self._look_out, batch, min(_QUIET * seconds, _LONGEST_QUIET))
        self._loop.call_soon(self._observe, batch, stages)

    def _look_out(self, ended: list[_Slice], quiet: float, missing: int | None = None) -> None:
        """Let the next batch leave without the callers of `ended` who are missing, once nobody else comes."""
        with self._lock:
            if not self._expected or self._running is not ended:
                return
            if self._expected != missing and time.perf_counter() < self._deadline:
                self._loop.call_later(quiet, self._look_out, ended, quiet, self._expected)
                return
            self._expected = 0
            self._together = False
            if self._waiting:  # else nobody was held up
                self._learn(paid=False)
            self._changed.notify()

    def _learn(self, *, paid: bool) -> None:
        self._in_vain = 0 if paid else self._in_vain + 1
        if self._in_vain >= _IN_VAIN:
            self._in_turns = _IN_TURNS

    def _observe(self, batch: list[_Slice], stages: list[Stage]) -> None:
        for item, start, _ in batch:
            if start == 0:
                self._metrics.seconds.observe(item.started - item.submitted)
        self._metrics.batch(_rows(batch), stages)


def _rows(parts: Iterable[_Slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def _gather(batch: list[_Slice]) -> Arrays:
    """One array of all rows for each input; a lone item is not copied."""
    slices = [tuple(array[start:stop] for array in item.inputs) for item, start, stop in batch]
    return _join(slices)


def _join(parts: list[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
