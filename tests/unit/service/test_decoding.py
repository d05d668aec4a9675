"""Images are decoded off the event loop where they are large, within limits for the whole request."""

import asyncio
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

from service import decoding
from service.decoding import Decoder
from service.errors import InvalidInput, Overloaded, TooLarge
from service.images import Pixels, Preprocess, open_image, prepare
from service.manifest import ImageSpec
from service.settings import Settings
from tests.support.encoded import encode
from tests.support.tiny_model import image_of

pytestmark = pytest.mark.anyio

SPEC = ImageSpec(height=28, width=28, channels=1, polarity="light_on_dark", centring="centre_of_mass", box=20)
SMALL = encode(image_of(1))
LARGE = encode(np.zeros((300, 300), np.uint8))


def decoder(**changes: object) -> Decoder:
    return Decoder(Settings.model_validate(changes))


async def test_images_come_back_in_order() -> None:
    """Many images make one batch in their order."""
    got = await decoder().decode([encode(image_of(index)) for index in range(10)], SPEC, "auto")
    np.testing.assert_array_equal(got, np.stack([image_of(index) for index in range(10)]))


async def test_only_a_small_image_is_decoded_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small image is decoded where it is; a large one, a long one, or several, on a thread."""
    threads = []

    def spy(*arguments: object) -> object:
        threads.append(threading.current_thread())
        return prepare(*arguments)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(decoding, "prepare", spy)
    here = decoder()
    await here.decode([SMALL], SPEC, "auto")
    await here.decode([LARGE], SPEC, "auto")
    await here.decode([SMALL + bytes(32 * 1024)], SPEC, "auto")
    await here.decode([SMALL, SMALL], SPEC, "auto")
    main = threading.main_thread()
    assert [thread is main for thread in threads] == [True, False, False, False, False]


async def test_only_a_lone_image_is_decoded_as_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several no pixel is decoded before their sum is judged, however small each of them is."""
    opened = []

    def spy(data: bytes, max_pixels: int, *, at_once: bool = False) -> Image.Image:
        opened.append(at_once)
        return open_image(data, max_pixels, at_once=at_once)

    monkeypatch.setattr(decoding, "open_image", spy)
    here = decoder()
    await here.decode([SMALL], SPEC, "auto")
    await here.decode([SMALL, SMALL], SPEC, "auto")
    assert opened == [True, False, False]


async def test_as_many_requests_are_decoded_at_once_as_there_are_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of two requests begins before the other one ends where there are two CPUs."""
    both = threading.Barrier(2)

    def meet(*arguments: object) -> object:
        both.wait(10)
        return prepare(*arguments)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(decoding, "cpu_limit", lambda: 2)
    monkeypatch.setattr(decoding, "prepare", meet)
    here = decoder()
    await asyncio.gather(*(here.decode([LARGE], SPEC, "auto") for _ in range(2)))


@pytest.mark.parametrize("fault", [b"nonsense", SMALL[:-30]], ids=["none", "half"])
async def test_the_image_at_fault_is_named(fault: bytes) -> None:
    """Of several images the error says which one, counting from 0, be it no image or one that breaks off."""
    with pytest.raises(InvalidInput) as refused:
        await decoder().decode([SMALL, fault], SPEC, "auto")
    assert refused.value.detail.startswith("Image 1: ")


async def test_limits_are_met_exactly() -> None:
    """Images and their pixels may reach each limit; one more is too many."""
    limited = decoder(max_images=2, max_request_pixels=2 * 28 * 28)
    assert len(await limited.decode([SMALL, SMALL], SPEC, "auto")) == 2
    with pytest.raises(TooLarge, match="Too many images"):
        await limited.decode([SMALL] * 3, SPEC, "auto")
    with pytest.raises(TooLarge, match="in all"):
        await limited.decode([SMALL, encode(np.zeros((29, 28), np.uint8))], SPEC, "auto")


async def test_waiting_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the threads are busy one more request than may wait is refused; later ones are served."""
    blocked = threading.Event()

    def wait(*arguments: object) -> object:
        assert blocked.wait(10)
        return prepare(*arguments)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(decoding, "prepare", wait)
    limited = decoder(max_decoding=2)
    tasks = [asyncio.create_task(limited.decode([LARGE], SPEC, "auto")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await limited.decode([LARGE], SPEC, "auto")
    assert refused.value.retry_after == 1
    blocked.set()
    await asyncio.gather(*tasks)
    assert (await limited.decode([LARGE], SPEC, "auto")).shape == (1, 28, 28)


@pytest.mark.parametrize("step", ["open_image", "prepare"])
async def test_decoding_stops_when_nobody_waits(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """After the caller has gone no further image of its request is opened, nor decoded."""
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    work = getattr(decoding, step)
    worked = []

    def wait(*arguments: object) -> object:
        begun.set()
        assert go_on.wait(10)
        worked.append(1)
        return work(*arguments)

    monkeypatch.setattr(decoding, step, wait)
    here = decoder()
    task = asyncio.create_task(here.decode([SMALL] * 50, SPEC, "auto"))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    await asyncio.wait([task])
    go_on.set()
    here._threads.submit(done.set)
    here._threads.shutdown(wait=True)
    assert done.is_set()
    assert len(worked) == 1


async def test_an_image_is_let_go_once_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many images of a request no two are held decoded: WebP's decoder keeps its pixels when closed."""
    held: list[weakref.ref[Image.Image]] = []

    def spy(image: Image.Image, spec: ImageSpec, preprocess: Preprocess) -> Pixels:
        assert not any(one() for one in held)
        held.append(weakref.ref(image))
        return prepare(image, spec, preprocess)

    monkeypatch.setattr(decoding, "prepare", spy)
    assert (await decoder().decode([encode(image_of(1), "WEBP")] * 4, SPEC, "auto")).shape == (4, 28, 28)


async def test_what_waits_at_the_end_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed, a decoder ends the image in hand, and no request that waits behind it is begun."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(*arguments: object) -> object:
        begun.set()
        assert go_on.wait(10)
        return prepare(*arguments)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(decoding, "cpu_limit", lambda: 1)
    monkeypatch.setattr(decoding, "prepare", wait)
    here = decoder()
    first, second = (asyncio.create_task(here.decode([LARGE], SPEC, "auto")) for _ in range(2))
    await asyncio.to_thread(begun.wait, 10)
    here.close()
    go_on.set()
    assert (await first).shape == (1, 28, 28)
    with pytest.raises(asyncio.CancelledError):
        await second
