"""Every promise of the batcher, on a device that starts and ends each run when the test says so."""

import asyncio
import contextlib
import gc
import logging
import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.batching import Arrays, Batcher
from service.context import begin_record
from service.errors import InferenceFailed, Overloaded, ShuttingDown
from service.metrics import Metrics

pytestmark = pytest.mark.anyio

LIMIT = 10.0  # seconds after which a test that hangs has failed


class Device:
    """Doubles its input, once it is told to go on; keeps what each batch held."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.broken = False
        self._started = threading.Semaphore(0)
        self._go_on = threading.Semaphore(0)

    def __call__(self, inputs: Arrays) -> Arrays:
        (values,) = inputs
        self.batches.append(values[:, 0].tolist())
        self._started.release()
        assert self._go_on.acquire(timeout=LIMIT)
        if self.broken:
            raise RuntimeError("the device is broken")
        return (values * 2, values + 1)

    async def started(self) -> None:
        """Wait until the device begins its next batch."""
        assert await asyncio.to_thread(self._started.acquire, timeout=LIMIT)

    def starts_at_once(self) -> bool:
        """Whether it begins its next batch while the event loop stands still."""
        return self._started.acquire(timeout=0.2)

    def go_on(self, batches: int = 1) -> None:
        self._go_on.release(batches)


class Clock:
    """Stands in for `time`, and goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 1.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("service.batching.time", made)
    monkeypatch.setattr("service.batching._LONGEST_QUIET", math.inf)  # timers are the event loop's own
    return made


def rows(*values: int) -> NDArray[Any]:
    return np.array(values)[:, np.newaxis]


@asynccontextmanager
async def batcher(
    run: Callable[[Arrays], Arrays], max_batch: int = 4, queue_length: int = 8, **more: int
) -> AsyncIterator[Batcher]:
    made = Batcher(
        "test",
        run,
        max_batch=max_batch,
        queue_length=queue_length,
        metrics=Metrics().queue("test", "1", "encoder"),
        **more,
    )
    try:
        async with asyncio.timeout(LIMIT) as limit:
            yield made
        assert not limit.expired()  # a task that swallowed the cancellation would hide it
    finally:
        if isinstance(run, Device):
            run.go_on(100)
        await made.close(LIMIT)


async def submitted(made: Batcher, *items: NDArray[Any]) -> list[asyncio.Task[Arrays]]:
    """Tasks whose items wait in the batcher by now, in this order."""
    tasks = [asyncio.create_task(made.submit(item)) for item in items]
    await asyncio.sleep(0)  # each task runs up to its first wait, which is for its answer
    return tasks


async def busy(made: Batcher, device: Device) -> asyncio.Task[Arrays]:
    """A lone item 0 that keeps the device busy until it may go on."""
    (task,) = await submitted(made, rows(0))
    await device.started()
    return task


async def go_on_after(
    seconds: float, made: Batcher, device: Device, clock: Clock, *waiting: NDArray[Any]
) -> None:
    """A lone item 0 takes so many seconds of the clock and is answered, while `waiting` have come."""
    first = await busy(made, device)
    await submitted(made, *waiting)
    clock.now += seconds
    device.go_on()
    await first


async def came_back(
    made: Batcher,
    device: Device,
    clock: Clock,
    running: list[asyncio.Task[Arrays]],
    number: int,
    after: float,
) -> list[asyncio.Task[Arrays]]:
    """One more item comes during a run of 600 s; who is answered by that is back as an item 9."""
    waiting = await submitted(made, rows(number))
    clock.now += 600
    device.go_on()
    await asyncio.gather(*running)
    clock.now += after
    waiting += await submitted(made, *(rows(9) for _ in running))
    await device.started()
    assert len(device.batches[-1]) == len(waiting)  # they run together
    return waiting


async def test_a_lone_item_does_not_wait() -> None:
    """With an idle device an item runs at once, alone, and gets both outputs."""
    device = Device()
    async with batcher(device) as made:
        (task,) = await submitted(made, rows(7))
        await device.started()
        device.go_on()
        doubled, incremented = await task
    assert device.batches == [[7]]
    assert (doubled.tolist(), incremented.tolist()) == ([[14]], [[8]])


async def test_what_waits_becomes_one_batch() -> None:
    """Items that arrive while the device is busy run together, and each gets its own rows."""
    device = Device()
    async with batcher(device) as made:
        first = await busy(made, device)
        tasks = await submitted(made, rows(1), rows(2, 3))
        device.go_on(2)
        answers = [(await task)[0].tolist() for task in (first, *tasks)]
    assert device.batches == [[0], [1, 2, 3]]
    assert answers == [[[0]], [[2]], [[4], [6]]]


async def test_who_was_read_together_runs_together() -> None:
    """However long the event loop takes for each of them, what it has read goes into one batch."""
    device = Device()
    async with batcher(device, queue_length=16) as made:

        async def caller(number: int) -> None:
            assert not device.starts_at_once()
            await made.submit(rows(number))

        first = await busy(made, device)
        device.go_on(100)
        await first
        await asyncio.gather(*map(caller, range(1, 4)))
    assert device.batches == [[0], [1, 2, 3]]


@pytest.mark.parametrize("left", [False, True])
async def test_a_run_that_ends_in_between_takes_none_of_them_away(left: bool) -> None:
    """A device that becomes free waits for who is still to be handed over, also if somebody came and left."""
    device = Device()
    async with batcher(device, few=1, queue_length=16) as made:

        async def caller(number: int) -> None:
            if number == 2:
                device.go_on()
            assert not device.starts_at_once()
            await made.submit(rows(number))

        await busy(made, device)
        if left:
            (gone,) = await submitted(made, rows(9))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
        callers = asyncio.gather(*map(caller, range(1, 4)))
        await device.started()
        device.go_on(100)
        await callers
    assert device.batches == [[0], [1, 2], [3]]


async def test_as_many_as_fill_a_batch_wait_for_nobody() -> None:
    """Once so many wait, a batch leaves while the event loop is still at the next callers."""
    device = Device()
    async with batcher(device, max_batch=2, queue_length=16) as made:
        submitting = [made.submit(rows(1)), made.submit(rows(2))]
        submitting[0].send(None)
        assert not device.starts_at_once()
        submitting[1].send(None)
        assert device.starts_at_once()
        for coroutine in submitting:
            coroutine.close()


async def test_half_of_the_callers_run_while_the_others_are_with_the_loop(clock: Clock) -> None:
    """Of the rows that wait and those that have just been answered, a batch takes half, in whole items."""
    device = Device()
    async with batcher(device, max_batch=16, queue_length=16) as made:
        await go_on_after(600, made, device, clock, *(rows(number) for number in range(1, 10)))
        await device.started()  # one was answered, nine waited
        (large,) = await submitted(made, rows(10, 11, 12))
        device.go_on(3)  # five were answered, seven rows wait
        await large
    assert device.batches == [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12]]


async def test_few_callers_run_together(clock: Clock) -> None:
    """Where all would make a small batch, it waits for those who have just been answered."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        await go_on_after(600, made, device, clock, rows(1), rows(2))
        await submitted(made, rows(3))
        await device.started()
    assert device.batches == [[0], [1, 2, 3]]


@pytest.mark.parametrize(("few", "together"), [(8, False), (12, True), (99, True)])
async def test_how_many_are_few_is_told(clock: Clock, few: int, together: bool) -> None:
    """Ten wait for him who was answered where twelve cost as much as one; elsewhere half of them leave."""
    device = Device()
    async with batcher(device, max_batch=16, queue_length=16, few=few) as made:
        await go_on_after(600, made, device, clock, *(rows(number) for number in range(1, 11)))
        if together:
            await submitted(made, rows(11))
        await device.started()
    assert device.batches[1] == list(range(1, 12 if together else 7))


async def test_few_callers_are_waited_for_while_they_keep_coming(clock: Clock) -> None:
    """Who is back holds the batch for the next one, each for an eighth of what the last run took."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        running = [await busy(made, device)]
        running += await submitted(made, rows(1), rows(2))
        clock.now += 600
        device.go_on()
        await running[0]
        running += await submitted(made, rows(3))
        await device.started()
        clock.now += 8
        device.go_on()
        await asyncio.gather(*running)
        for number in range(4, 7):
            await asyncio.sleep(0.6)  # of 1
            await submitted(made, rows(number))
        await device.started()
    assert device.batches == [[0], [1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("seconds", "longest", "max_batch"),
    [(0.1, math.inf, 16), (600, 0.05, 16), (600, math.inf, 4)],
    ids=["nobody comes", "the run was held up", "a full batch waits"],
)
async def test_few_callers_are_not_waited_for_in_vain(
    seconds: float, longest: float, max_batch: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch leaves once nobody came for an eighth of the run, at most for a moment; a full one at once."""
    monkeypatch.setattr("service.batching._LONGEST_QUIET", longest)
    device = Device()
    async with batcher(device, max_batch) as made:
        await go_on_after(seconds, made, device, clock, *(rows(number) for number in range(1, 5)))
        await device.started()
    assert device.batches[:2] == [[0], [1, 2, 3]]  # half of five


async def test_a_batch_that_is_full_while_it_waits_leaves(clock: Clock) -> None:
    """Once as many rows have come as a batch may hold, the other callers are not waited for."""
    device = Device()
    async with batcher(device) as made:
        await go_on_after(600, made, device, clock, rows(1), rows(2))
        (third,) = await submitted(made, rows(3))
        await device.started()
        clock.now += 600
        device.go_on()
        await third
        await submitted(made, rows(4, 5, 6, 7))
        await device.started()
    assert device.batches == [[0], [1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("failing", [True, False])
async def test_callers_who_have_no_answer_are_not_waited_for(failing: bool, clock: Clock) -> None:
    """Who left during a run, or was told that it failed, is not expected back."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        first = await busy(made, device)
        await submitted(made, rows(1))
        clock.now += 600
        device.broken = failing
        if not failing:
            first.cancel()
        device.go_on()
        with pytest.raises(InferenceFailed if failing else asyncio.CancelledError):
            await first
        await device.started()
        device.broken = False
    assert device.batches == [[0], [1]]


async def test_a_lone_caller_is_not_held_up(clock: Clock) -> None:
    """After a lone item the next runs at once, however long the run took; no wait is counted."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        for number in (1, 2, 3):
            (task,) = await submitted(made, rows(number))
            await device.started()
            clock.now += 0.02 * number
            device.go_on()
            await task
            clock.now += 0.05  # longer than half a run
        await go_on_after(600, made, device, clock, rows(4))
        await submitted(made, rows(5))
        await device.started()
    assert device.batches == [[1], [2], [3], [0], [4, 5]]


async def test_few_callers_are_waited_for_again_after_one_wait_in_vain(clock: Clock) -> None:
    """Waits in vain that are not in a row are no reason to stop waiting."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        running = [await busy(made, device)]
        for after in (301, 301, 0, 301, 0):
            running = await came_back(made, device, clock, running, 1, after)
    assert device.batches[-1] == [1, 9, 9, 9, 9, 9]


async def test_a_wait_that_is_over_does_not_end_the_next(clock: Clock) -> None:
    """A run's callers are looked out for after that run alone, though another has ended since."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        await go_on_after(0.2, made, device, clock, rows(1))
        running = await submitted(made, rows(2))
        await device.started()
        await submitted(made, rows(3))
        clock.now += 600
        device.go_on()
        await asyncio.gather(*running)
        await asyncio.sleep(0.2)  # longer than an eighth of the first run
        await submitted(made, rows(4), rows(5))
        await device.started()
    assert device.batches == [[0], [1, 2], [3, 4, 5]]


async def test_few_callers_run_in_turns_where_waiting_is_in_vain(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three waits for callers who did not come, batches do not wait, until it is tried again."""
    monkeypatch.setattr("service.batching._IN_TURNS", 1)
    device = Device()
    async with batcher(device, max_batch=16) as made:
        await busy(made, device)
        for number in range(1, 4):
            await submitted(made, rows(number))
            device.go_on()
            await device.started()
        (fourth,) = await submitted(made, rows(4))
        clock.now += 600  # whoever waited now would wait for an eighth of it
        device.go_on()
        await device.started()
        assert device.batches == [[0], [1], [2], [3], [4]]
        await submitted(made, rows(5))
        clock.now += 600
        device.go_on()
        await fourth
        await submitted(made, rows(6))
        await device.started()
    assert device.batches[5:] == [[5, 6]]


async def test_a_wait_that_held_up_nobody_is_not_in_vain(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers who do not come back are no reason to stop waiting for others, if nobody waited for them."""
    monkeypatch.setattr("service.batching._IN_VAIN", 2)
    device = Device()
    async with batcher(device, max_batch=16) as made:
        await busy(made, device)
        running = await submitted(made, rows(1), rows(2))
        device.go_on()  # these two wait in vain for the first
        await device.started()
        device.go_on()
        await asyncio.gather(*running)
        await asyncio.sleep(0.05)  # nobody waits for these two
        await go_on_after(600, made, device, clock, rows(3))
        await submitted(made, rows(4))
        await device.started()
    assert device.batches == [[0], [1, 2], [0], [3, 4]]


async def test_few_callers_run_in_turns_where_they_come_back_late(clock: Clock) -> None:
    """A wait is in vain, too, if it took longer than half a run until the last of them was back."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        running = [await busy(made, device)]
        for number in range(1, 4):
            running = await came_back(made, device, clock, running, number, 301)
        await submitted(made, rows(4))
        clock.now += 600
        device.go_on()
        await device.started()
    assert device.batches == [[0], [1, 9], [2, 9, 9], [3, 9, 9, 9], [4]]


async def test_closing_does_not_wait_for_callers(clock: Clock) -> None:
    """What waits for those who were answered runs at once when the batcher is closed."""
    device = Device()
    async with batcher(device, max_batch=16) as made:
        first = await busy(made, device)
        (second,) = await submitted(made, rows(1))
        clock.now += 600
        device.go_on(2)
        await first
        await made.close(LIMIT)
        assert (await second)[0].tolist() == [[2]]


async def test_a_full_batch_leaves_without_the_rest() -> None:
    """A batch never holds more rows than the limit; what does not fit is in the next one."""
    device = Device()
    async with batcher(device, max_batch=2) as made:
        await busy(made, device)
        tasks = await submitted(made, rows(1), rows(2), rows(3))
        device.go_on(3)
        await asyncio.gather(*tasks)
    assert device.batches == [[0], [1, 2], [3]]


async def test_an_item_larger_than_a_batch_is_split_and_joined() -> None:
    """An item with more rows than a batch, and than the queue, comes back whole and in order."""
    device = Device()
    device.go_on(100)
    values = np.arange(25)[:, np.newaxis]
    async with batcher(device, max_batch=4, queue_length=4) as made:
        doubled, incremented = await made.submit(values)
    assert [len(batch) for batch in device.batches] == [4, 4, 4, 4, 4, 4, 1]
    np.testing.assert_array_equal(doubled, values * 2)
    np.testing.assert_array_equal(incremented, values + 1)


async def test_a_large_item_takes_turns() -> None:
    """Small items that arrive behind a large one run after one batch of it, not after all of it."""
    device = Device()
    async with batcher(device, max_batch=2) as made:
        await busy(made, device)
        tasks = await submitted(made, rows(1, 2, 3, 4, 5, 6), rows(70), rows(80))
        device.go_on(5)
        await asyncio.gather(*tasks)
    assert device.batches == [[0], [1, 2], [70, 80], [3, 4], [5, 6]]


async def test_a_small_item_that_is_split_goes_on_at_once() -> None:
    """What is no larger than a batch, and found room for a part of itself alone, is first in the next one."""
    device = Device()
    async with batcher(device) as made:
        await busy(made, device)
        tasks = await submitted(made, rows(1, 2, 3), rows(4, 5, 6), rows(7), rows(8))
        device.go_on(3)
        await asyncio.gather(*tasks)
    assert device.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]


async def test_a_full_queue_refuses_at_once() -> None:
    """The row that exceeds the queue is refused while the device is still busy; the others are served."""
    device = Device()
    async with batcher(device, max_batch=2, queue_length=3) as made:
        await busy(made, device)
        tasks = await submitted(made, rows(1), rows(2, 3))
        assert made.depth == 3
        with pytest.raises(Overloaded) as refused:
            await made.submit(rows(4))
        device.go_on(3)
        await asyncio.gather(*tasks)
        assert made.depth == 0
    assert int(refused.value.headers["Retry-After"]) >= 1
    assert "3 rows wait" in refused.value.detail
    assert refused.value.detail.endswith("queue holds 3: no room for 1 more")
    assert [4] not in device.batches


async def test_what_failed_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that fails every run keeps none of what it was given, though Python looks for no cycles."""
    device = Device()
    device.broken = True
    monkeypatch.setattr("service.batching.logger", logging.Logger("unheard"))  # pytest keeps what it hears
    given: list[weakref.ref[NDArray[np.float32]]] = []
    gc.disable()
    try:
        async with batcher(device) as made:
            for _ in range(3):
                values = np.zeros((1, 1), np.float32)
                given.append(weakref.ref(values))
                task = asyncio.create_task(made.submit(values))
                del values
                await device.started()
                device.go_on()
                with contextlib.suppress(InferenceFailed):  # `raises` would keep it
                    await task
                del task
            assert [values() is None for values in given[:-1]] == [True, True]  # the last is the thread's
    finally:
        gc.enable()


async def test_retry_after_follows_the_measured_speed(clock: Clock) -> None:
    """A queue that takes long to empty says so to those whom it refuses."""
    device = Device()
    async with batcher(device, max_batch=2, queue_length=3) as made:
        (first,) = await submitted(made, rows(1, 2))
        await device.started()
        clock.now += 81  # seconds for two rows, of which the average takes a fifth
        device.go_on()
        await first
        await busy(made, device)
        await submitted(made, rows(3), rows(4), rows(5))
        with pytest.raises(Overloaded) as refused:
            await made.submit(rows(6))
    assert refused.value.retry_after == 25  # 3 * 8.1


async def test_a_split_item_has_waited_when_its_first_rows_leave(clock: Clock) -> None:
    """The runs between its parts are no time in the queue."""
    device = Device()
    stages = begin_record()
    async with batcher(device, max_batch=1) as made:
        (task,) = await submitted(made, rows(1, 2))
        await device.started()
        clock.now += 5
        device.go_on(2)
        await task
    assert [(stage.name, stage.seconds) for stage in stages] == [("queue", 0)]


async def test_a_cancelled_caller_is_not_computed_and_spares_its_neighbours() -> None:
    """Who leaves while waiting never reaches the device, frees the queue, and the neighbours are answered."""
    device = Device()
    async with batcher(device, queue_length=4) as made:
        await busy(made, device)
        one, two, three = await submitted(made, rows(1), rows(2, 2), rows(3))
        two.cancel()
        await asyncio.wait([two])
        assert made.depth == 2
        device.go_on(2)
        assert ((await one)[0].tolist(), (await three)[0].tolist()) == ([[2]], [[6]])
    assert two.cancelled()
    assert device.batches == [[0], [1, 3]]


async def test_a_caller_that_leaves_during_its_run_spares_its_neighbours() -> None:
    """Cancelling one caller of a batch that is on the device leaves the others' answers whole."""
    device = Device()
    async with batcher(device) as made:
        await busy(made, device)
        one, two = await submitted(made, rows(1), rows(2))
        device.go_on()
        await device.started()
        one.cancel()
        await asyncio.wait([one])
        device.go_on()
        assert (await two)[0].tolist() == [[4]]
    assert one.cancelled()


async def test_the_rest_of_a_large_item_is_dropped_when_its_caller_leaves() -> None:
    """Of a split item no further batch runs once its caller has gone."""
    device = Device()
    async with batcher(device, max_batch=2) as made:
        (task,) = await submitted(made, rows(1, 2, 3, 4, 5, 6))
        await device.started()
        task.cancel()
        await asyncio.wait([task])
        assert made.depth == 0
        (other,) = await submitted(made, rows(9))
        device.go_on(2)
        await other
    assert device.batches == [[1, 2], [9]]


async def test_a_failing_run_fails_only_its_batch() -> None:
    """Everybody in the failed batch hears of it, and the next batch is served."""
    device = Device()
    async with batcher(device) as made:
        first = await busy(made, device)
        device.broken = True
        failing = await submitted(made, rows(1), rows(2))
        device.go_on()
        with pytest.raises(InferenceFailed):
            await first
        await device.started()
        device.go_on()
        results = await asyncio.gather(*failing, return_exceptions=True)
        device.broken = False
        device.go_on()
        (healthy,) = await submitted(made, rows(3))
        assert (await healthy)[0].tolist() == [[6]]
    assert [type(result) for result in results] == [InferenceFailed, InferenceFailed]
    assert results[0] is not results[1]  # a shared exception would collect every caller's traceback


async def test_three_failed_runs_in_a_row_are_known() -> None:
    """After the third it does not work, whatever came before, and after one that succeeds it does again."""
    device = Device()
    device.go_on(100)
    seen = []
    async with batcher(device) as made:
        for broken in (True, True, False, True, True, True, True, False):
            device.broken = broken
            with contextlib.suppress(InferenceFailed):
                await made.submit(rows(1))
            seen.append(made.works(LIMIT))
    assert seen == [True, True, True, True, True, False, False, True]


async def test_a_run_that_does_not_end_is_known() -> None:
    """While a run lasts longer than the limit it does not work; waiting for work is no run."""
    device = Device()
    async with batcher(device) as made:
        assert made.works(0)
        task = await busy(made, device)
        assert made.works(LIMIT)
        assert not made.works(0)
        device.go_on()
        await task
        assert made.works(0)


async def test_a_large_item_with_a_failed_part_is_dropped() -> None:
    """When one part of a split item fails, its caller hears of it and the rest does not run."""
    device = Device()
    device.broken = True
    async with batcher(device, max_batch=1) as made:
        (task,) = await submitted(made, rows(1, 2, 3, 4))
        await device.started()
        device.go_on()
        with pytest.raises(InferenceFailed):
            await task
        assert made.depth == 0
    assert len(device.batches) <= 2  # the second part may have been on its way


async def test_closing_finishes_what_waits() -> None:
    """close() within its limit answers every waiting caller with a result and refuses new ones."""
    device = Device()
    async with batcher(device, max_batch=1) as made:
        first = await busy(made, device)
        tasks = await submitted(made, rows(1), rows(2))
        closing = asyncio.create_task(made.close(LIMIT))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await made.submit(rows(3))
        device.go_on(3)
        await closing
        assert [(await task)[0].tolist() for task in (first, *tasks)] == [[[0]], [[2]], [[4]]]


async def test_closing_at_its_limit_answers_everyone() -> None:
    """When the limit passes, callers on the device and in the queue hear that the service stops."""
    device = Device()
    async with batcher(device, max_batch=1) as made:
        first = await busy(made, device)
        tasks = await submitted(made, rows(1), rows(2, 3))
        await made.close(0)
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [type(result) for result in results] == [ShuttingDown] * 3
        assert made.depth == 0
    assert device.batches == [[0]]


def test_a_run_that_outlasts_its_event_loop_ends_in_silence() -> None:
    """Its thread ends without an error when nobody is left to hear of the outputs."""
    device = Device()

    async def leave() -> threading.Thread:
        made = Batcher(
            "test", device, max_batch=1, queue_length=1, metrics=Metrics().queue("test", "1", "encoder")
        )
        task = await busy(made, device)
        await made.close(0)
        with pytest.raises(ShuttingDown):
            await task
        return made._thread

    thread = asyncio.run(leave())
    device.go_on()
    thread.join(LIMIT)
    assert not thread.is_alive()


async def test_the_event_loop_is_free_while_the_device_works() -> None:
    """A run on the device does not hold up the event loop."""
    device = Device()
    async with batcher(device) as made:
        task = await busy(made, device)
        ticks = 0
        while ticks < 100:
            await asyncio.sleep(0)
            ticks += 1
        assert not task.done()
        device.go_on()
        await task


async def test_many_callers_each_get_their_own_rows() -> None:
    """Under hundreds of concurrent callers of different sizes every row goes back to who sent it."""

    def run(inputs: Arrays) -> Arrays:
        return (inputs[0] * 2,)

    async with batcher(run, max_batch=8, queue_length=10_000) as made:
        items = [rows(*range(start, start + 1 + start % 20)) for start in range(300)]
        answers = await asyncio.gather(*(made.submit(item) for item in items))
    for item, (doubled,) in zip(items, answers, strict=True):
        np.testing.assert_array_equal(doubled, item * 2)
