"""Decoding requests' images without holding up the event loop."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image

from service.context import Measured
from service.cpus import cpu_limit
from service.errors import Overloaded, RequestError, TooLarge
from service.images import Pixels, Preprocess, open_image, prepare
from service.manifest import ImageSpec
from service.settings import Settings

# A single image up to these sizes takes less than a millisecond, which a change of threads costs as well.
_SMALL_BYTES = 32 * 1024
_SMALL_PIXELS = 64 * 64


class Decoder:
    """Turns bytes into a batch of the network's images; small ones at once, others on threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(cpu_limit(), thread_name_prefix="decode")
        self._pending = 0

    async def decode(self, images: Sequence[bytes], spec: ImageSpec, preprocess: Preprocess) -> Pixels:
        """Encoded images to uint8 (N, H, W[, 3]).

        Raises:
            TooLarge, InvalidInput: naming the image at fault.
            Overloaded: too many requests wait for the threads.
        """
        if len(images) > self._settings.max_images:
            raise TooLarge(
                "Too many images.",
                received=str(len(images)),
                expected=f"at most {self._settings.max_images} images",
            )
        with Measured("image_decode"):
            return await self._decode_anywhere(images, spec, preprocess)

    async def _decode_anywhere(
        self, images: Sequence[bytes], spec: ImageSpec, preprocess: Preprocess
    ) -> Pixels:
        if len(images) == 1 and len(images[0]) <= _SMALL_BYTES:
            opened = open_image(images[0], self._settings.max_pixels, at_once=True)
            width, height = opened.size
            if width * height <= _SMALL_PIXELS:
                return prepare(opened, spec, preprocess)[np.newaxis]
        if self._pending >= self._settings.max_decoding:
            raise Overloaded(f"{self._pending} requests wait for image decoding", retry_after=1)
        abandoned = threading.Event()
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._decode, images, spec, preprocess, abandoned
            )
        finally:
            abandoned.set()
            self._pending -= 1

    def _decode(
        self, images: Sequence[bytes], spec: ImageSpec, preprocess: Preprocess, abandoned: threading.Event
    ) -> Pixels:
        opened: list[Image.Image] = []
        for position, data in enumerate(images):
            if abandoned.is_set():  # the caller left or ran out of time: nobody reads the result
                return np.empty((0, *spec.shape), np.uint8)
            with naming(position, len(images)):
                opened.append(open_image(data, self._settings.max_pixels))
        pixels = sum(image.width * image.height for image in opened)
        if pixels > self._settings.max_request_pixels:
            raise TooLarge(
                "The images have too many pixels in all.",
                received=f"{pixels} pixels",
                expected=f"at most {self._settings.max_request_pixels} pixels in one request",
            )
        prepared = np.empty((len(images), *spec.shape), np.uint8)
        opened.reverse()
        for position in range(len(images)):
            if abandoned.is_set():
                break
            with naming(position, len(images)):
                # Held by nobody afterwards: it may have its pixels even when closed.
                prepared[position] = prepare(opened.pop(), spec, preprocess)
        return prepared

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def naming(position: int, count: int) -> Iterator[None]:
    """Say in an error which of several images is at fault."""
    try:
        yield
    except RequestError as error:
        if count > 1:
            error.detail = f"Image {position}: {error.detail}"
        raise
