"""The models that are served, and what can be asked of one: predict, reconstruct, sweep.

Plain Python over numpy arrays; HTTP stops above this module.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.batching import FEW, FEW_ON_ONE, Arrays, Batcher
from service.binding import BoundSession, fetched
from service.context import Measured
from service.errors import DeviceError, NotWorking, ShuttingDown, StartError, UnableToAnswer, UnknownModel
from service.handover import agreed_models
from service.manifest import (
    Graph,
    Manifest,
    ManifestError,
    Precision,
    UsedDevice,
    check_content,
    draws,
    model_folders,
    read_manifest,
    require_manifest,
)
from service.metrics import Metrics
from service.sessions import (
    PaddedSession,
    Runs,
    Session,
    buckets,
    choose_precision,
    cuda_options,
    on_one_processor,
    open_session,
    session_threads,
    warm_up,
)
from service.settings import Settings
from service.tweaks import sweep_capsules

logger = logging.getLogger(__name__)

Float = NDArray[np.float32]

Way = Literal["plain", "padded", "bound"]
"""How graphs are run: batches as they are, padded to few sizes, or padded in buffers on the device."""
Padded = PaddedSession | BoundSession


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the network says of N images."""

    capsules: Float  # (N, classes, dimensions)
    lengths: Float  # (N, classes)
    index: NDArray[np.int64]  # (N,) the longest capsule
    reconstructions: Float  # (N, H, W[, 3]) in [0, 1], from that capsule alone
    errors: Float  # (N,) summed squared difference between reconstruction and image, scaled to [0, 1]
    in_distribution: NDArray[np.bool_]  # (N,) whether it is such an image as the classes' own are


@dataclass(frozen=True)
class Graphs:
    """A verified model folder, its graphs loaded and warmed up."""

    manifest: Manifest
    precision: Precision
    device: UsedDevice
    threads: int
    encoder: Runs
    drawer: Runs | None
    """The decoder as `predict` runs it, on the capsules that the encoder has just given; none if the encoder
    draws itself."""
    decoder: Runs

    def predict(self, inputs: Arrays) -> Arrays:
        """Images (B, H, W[, 3]) to the arrays of `Predictions`, in its order.

        The second input (B,) says whose reconstruction anybody will look at; if nobody's, they are zero.

        Decoding the longest capsules costs less here than as a separate step with a queue of its own:
        see docs/decisions/0011.
        """
        images, drawn = inputs
        with Measured("encoder"):
            encoded, found, *redrawn = self.encoder.run(images)
            capsules, lengths = fetched(encoded), fetched(found)
        if not np.isfinite(lengths).all():
            raise FloatingPointError(f"{self.manifest.reference} in {self.precision} gives what is no number")
        index = lengths.argmax(axis=1)
        if not drawn.any():
            nothing = np.zeros(images.shape, np.float32)
            errors, usual = (np.zeros(len(images), kind) for kind in (np.float32, np.bool_))
            return capsules, lengths, index, nothing, errors, usual
        if self.drawer is None:
            reconstructions = fetched(*redrawn)
        else:
            with Measured("decoder"):
                reconstructions = fetched(*self.drawer.run(encoded, index))
        differences = (reconstructions - images / np.float32(255)).reshape(len(images), -1)
        errors = np.einsum("bp,bp->b", differences, differences)
        usual = self.manifest.calibration.usual(errors, lengths) & ~_blank(images)
        return capsules, lengths, index, reconstructions, errors, usual

    def decode(self, inputs: Arrays) -> Arrays:
        """Capsules (B, classes, dimensions) and targets (B,) to reconstructions (B, H, W[, 3])."""
        with Measured("decoder"):
            return (fetched(*self.decoder.run(*inputs)),)


def _blank(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of the images (B, H, W[, 3]) are of one level: nothing is on them, whatever the capsules say."""
    levels = images.reshape(len(images), -1)
    same: NDArray[np.bool_] = levels.max(axis=1) == levels.min(axis=1)
    return same


def load_graphs(folder: Path, settings: Settings) -> Graphs:
    """Verify, load and warm up the model in `folder`; blocks for about as long as a second.

    Raises:
        ManifestError: naming the file at fault and the reason.
        DeviceError: the device that was asked for is not in use, or cannot run the precision asked for.
    """
    manifest = read_manifest(folder)

    def opened(graph: Graph, precision: Precision) -> Session:
        return open_session(
            folder / graph.file,
            graph,
            device=settings.device,
            threads=session_threads(settings),
            cuda=cuda_options(settings, precision),
        )

    decoder = opened(manifest.decoder, "fp32")
    precision = choose_precision(folder, manifest, settings.precision, decoder.device)
    chosen = manifest.encoders(decoder.device)[precision]
    encoder = opened(chosen, precision)
    # Encoders read some of their weights in these files, which somebody may have been writing since.
    for read in (manifest.encoder, manifest.decoder):
        check_content(folder / read.file, read)
    device: UsedDevice = "cpu" if "cpu" in (encoder.device, decoder.device) else "cuda"
    rows = settings.max_batch, settings.max_decoder_batch
    try:
        graphs = bring_together(manifest, precision, chosen, encoder, decoder, rows, way_of(device, settings))
    except Exception as error:  # the same exceptions as below
        raise DeviceError(f"{folder}: {encoder.device} has no room for its batches: {error}") from error
    for runs, graph, most in (
        (graphs.encoder, chosen, settings.max_batch),
        (graphs.drawer, manifest.decoder, settings.max_batch),
        (graphs.decoder, manifest.decoder, settings.max_decoder_batch),
    ):
        if runs is None:
            continue
        try:
            warm_up(runs, graph, warm_up_sizes(runs, most))
        except Exception as error:  # ONNX Runtime's exceptions share no base but this
            raise ManifestError(f"{folder / graph.file}: ONNX Runtime cannot run it: {error}") from error
    return graphs


def warm_up_sizes(runs: Runs, most: int) -> Sequence[int]:
    """Rows to run once before the first request, where a batch has `most` at most.

    On a device each size twice: from its second run on, it takes all its memory as one piece.
    """
    return 2 * runs.sizes if isinstance(runs, Padded) else buckets(most)


def way_of(device: UsedDevice, settings: Settings) -> Way:
    """On a CPU, padding would be computed for nothing; CUDA graphs need their buffers where they were."""
    if device == "cpu":
        return "plain"
    return "bound" if settings.cuda_graphs else "padded"


def bring_together(
    manifest: Manifest,
    precision: Precision,
    chosen: Graph,
    encoder: Session,
    decoder: Session,
    max_batches: tuple[int, int],
    way: Way,
) -> Graphs:
    """The graphs of a model, as they are run.

    Args:
        chosen: what the manifest says about the encoder's graph.
        max_batches: most rows of the encoder and of the decoder.
    """
    most, most_decoded = max_batches
    encodes = _runs(way, encoder, chosen, [most])  # it has convolutions
    upstream = encodes if isinstance(encodes, BoundSession) else None
    return Graphs(
        manifest,
        precision,
        encoder.device,
        encoder.threads,
        encodes,
        None if draws(chosen) else _runs(way, decoder, manifest.decoder, [most], upstream),
        _runs(way, decoder, manifest.decoder, buckets(most_decoded)),
    )


def _runs(
    way: Way, session: Session, graph: Graph, sizes: Sequence[int], upstream: BoundSession | None = None
) -> Runs:
    if way == "plain":
        return session
    return PaddedSession(session, sizes) if way == "padded" else BoundSession(session, graph, sizes, upstream)


class Model:
    """One served version of a model. Belongs to the event loop it was made on."""

    def __init__(self, graphs: Graphs, settings: Settings, metrics: Metrics) -> None:
        self.manifest = graphs.manifest
        self.device: UsedDevice = graphs.device
        self.precision = graphs.precision
        self.threads = graphs.threads
        served = self.manifest.name, self.manifest.version
        name = "/".join(served)
        told = (*served, self.device, self.precision, self.threads)
        self._forget = partial(metrics.forget, *told)
        self._limit = settings.request_timeout
        self._trial: asyncio.Task[None] | None = None
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        few = FEW_ON_ONE if on_one_processor(settings) else FEW
        if isinstance(graphs.encoder, Padded):  # to the largest batch: one takes as long as the other
            few = settings.max_batch
        self._encoder = Batcher(
            f"{name} encoder",
            graphs.predict,
            max_batch=settings.max_batch,
            queue_length=settings.queue_length,
            metrics=metrics.queue(*served, "encoder"),
            few=few,
        )
        self._decoder = Batcher(
            f"{name} decoder",
            graphs.decode,
            max_batch=settings.max_decoder_batch,
            queue_length=settings.decoder_queue_length,
            metrics=metrics.queue(*served, "decoder"),
        )
        metrics.model(*told)

    def in_use(self) -> "_Use":
        """Keep the version served for as long as a request needs it, whoever retires it meanwhile.

        For a `with`, which gets the model.
        """
        return _Use(self)

    def _count(self, users: int) -> None:
        self._users += users
        if self._users:
            self._unused.clear()
        else:
            self._unused.set()

    def works(self) -> bool:
        """Whether answers can be expected of it.

        Where they cannot, whoever asks sets off a trial, since callers may have been sent elsewhere. Once a
        run succeeds, this is true again.
        """
        if all(queue.works(self._limit) for queue in (self._encoder, self._decoder)):
            return True
        if self._trial is None or self._trial.done():
            self._trial = asyncio.create_task(self._try(), context=Context())  # not the request's own
        return False

    async def _try(self) -> None:
        blank = np.zeros((1, *self.manifest.image.shape), np.uint8)
        with suppress(UnableToAnswer):
            found = await self.predict(blank)
            await self.reconstruct(found.capsules, found.index)

    def require_room(self) -> None:
        """Refuse an image that could not be admitted before it is decoded.

        Raises:
            Overloaded: the encoder's queue is full.
        """
        self._encoder.require_room()

    async def predict(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify images (N, H, W[, 3]) and reconstruct each from its longest capsule."""
        _require(images, np.uint8, self.manifest.image.shape)
        return Predictions(*await self._encoder.submit(images, _all(len(images))))

    async def encode(self, images: NDArray[np.uint8]) -> tuple[Float, Float]:
        """Capsules (N, classes, dimensions) of images (N, H, W[, 3]), and their lengths (N, classes)."""
        _require(images, np.uint8, self.manifest.image.shape)
        capsules, lengths, *_ = await self._encoder.submit(images, np.zeros(len(images), np.bool_))
        return capsules, lengths

    async def reconstruct(self, capsules: Float, target: NDArray[np.int64]) -> Float:
        """Draw (N, H, W[, 3]) in [0, 1] from the `target` (N,) capsule of each `capsules` (N, C, D)."""
        _require(capsules, np.float32, self.manifest.capsule_shape)
        (reconstructions,) = await self._decoder.submit(capsules, target)
        return reconstructions

    async def sweep(
        self, capsules: Float, index: int, dimensions: Sequence[int], deltas: Sequence[float]
    ) -> Float:
        """Move each dimension of capsule `index` through `deltas`: (dimensions, deltas, H, W[, 3]).

        `capsules` is one image's (classes, dimensions); all reconstructions are drawn in one batch.
        """
        swept = sweep_capsules(capsules, index, dimensions, deltas)
        drawn = await self.reconstruct(swept, np.full(len(swept), index, np.int64))
        return drawn.reshape(len(dimensions), len(deltas), *drawn.shape[1:])

    async def close(self, limit: float) -> None:
        """Finish what waits within `limit` seconds, then fail the rest."""
        await asyncio.gather(self._encoder.close(limit), self._decoder.close(limit))

    async def retire(self, limit: float) -> None:
        """Close once no request needs the version any more, and drop its figures.

        A request that was given up may have left a batch running; `limit` seconds are waited for that.
        """
        await self._unused.wait()
        await self.close(limit)
        self._forget()


class _Use:
    __slots__ = ("_model",)

    def __init__(self, model: Model) -> None:
        self._model = model

    def __enter__(self) -> Model:
        self._model._count(1)
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model._count(-1)


@lru_cache(maxsize=64)
def _all(rows: int) -> NDArray[np.bool_]:
    everyone = np.ones(rows, np.bool_)
    everyone.flags.writeable = False  # it is everybody's
    return everyone


def _require(array: NDArray[np.generic], dtype: type[np.generic], row: tuple[int, ...]) -> None:
    """Keep a batch's neighbours safe: an array of another form would spoil all of them."""
    if array.dtype != dtype or array.shape[1:] != row or len(array) == 0:
        raise ValueError(
            f"{array.dtype} {array.shape}, expected {np.dtype(dtype)} (N, {row}) with N at least 1"
        )


class Engine:
    """All served models by name and version."""

    def __init__(self, models: Sequence[Model], default_model: str | None) -> None:
        self._models: dict[str, dict[str, Model]] = {}  # by name and version, the newest first
        for model in models:
            self._add(model)
        self._retiring: set[Model] = set()
        self._default = default_model or min(self._models)
        if self._default not in self._models:
            raise StartError(
                f"CAPSNET_DEFAULT_MODEL is {default_model!r}; "
                f"the models folder holds {', '.join(sorted(self._models))}"
            )
        self.ready = True
        """False from the moment the service begins to stop."""
        self._closed = False

    def __iter__(self) -> Iterator[Model]:
        """Models by name, newest version first."""
        for name in sorted(self._models):
            yield from self._models[name].values()

    @property
    def default(self) -> Model:
        return self.choose("")

    def choose(self, reference: str) -> Model:
        """The model that `name` (newest version) or `name/version` refers to; "" is the default one.

        Raises:
            UnknownModel: no such name or version.
        """
        name, _, version = (reference or self._default).partition("/")
        versions = self._models.get(name, {})
        if versions and not version and "/" not in reference:
            version = next(iter(versions))
        if version not in versions:
            served = ", ".join(model.manifest.reference for model in self)
            raise UnknownModel(
                "This model is not served.",
                received=repr(reference[:100]),
                expected=f"a name or name/version among {served}",
            )
        return versions[version]

    def require_ready(self, model: Model | None = None) -> None:
        """Refuse where requests should not be sent: to this model, or to any.

        Raises:
            ShuttingDown: the service has begun to stop.
            NotWorking: runs of a model fail, or one of them does not end.
        """
        if not self.ready:
            raise ShuttingDown("The service is stopping; another instance has to take new requests.")
        broken = [asked for asked in ((model,) if model else self) if not asked.works()]
        if broken:
            names = ", ".join(found.manifest.reference for found in broken)
            raise NotWorking(f"Runs of {names} fail or do not end; the log says more.")

    def _add(self, model: Model) -> None:
        versions = self._models.get(model.manifest.name, {}) | {model.manifest.version: model}
        newest_first = sorted(versions.items(), key=lambda served: int(served[0]), reverse=True)
        self._models[model.manifest.name] = dict(newest_first)

    async def change(self, added: Sequence[Model], retired: Sequence[Model], limit: float) -> None:
        """Serve the versions in `added` from now on, and those in `retired` no longer.

        To requests this is one step. Those that already use a retired version finish on it; when this
        returns, they have. The default model must keep a version.
        """
        self._retiring.update(retired)
        for model in added:
            self._add(model)
            _announce(model)
        for model in retired:
            logger.info("%s/%s is being retired", model.manifest.name, model.manifest.version)
            versions = self._models[model.manifest.name]
            del versions[model.manifest.version]
            if not versions:
                del self._models[model.manifest.name]
        await asyncio.gather(*(model.retire(limit) for model in retired))
        self._retiring.difference_update(retired)

    async def close(self, limit: float) -> None:
        """Refuse new work, finish what waits within `limit` seconds, and fail the rest.

        A run that outlasted the limit of an earlier call is not waited for again.
        """
        self.ready = False
        limit, self._closed = 0.0 if self._closed else limit, True
        await asyncio.gather(*(model.close(limit) for model in (*self, *self._retiring)))


def _folders(settings: Settings) -> list[Path]:
    """What to serve: all that the models folder holds, or in a worker what it held when the first started.

    Raises:
        StartError: there is nothing.
        ManifestError: something of it is no longer what it was.
    """
    agreed = agreed_models()
    if agreed is None:
        return model_folders(settings.models)
    for folder, checksum in agreed.items():
        require_manifest(folder, checksum)
    return list(agreed)


def _announce(model: Model) -> None:
    logger.info(
        "%s/%s is ready on %s in %s, %d CPU threads",
        model.manifest.name,
        model.manifest.version,
        model.device,
        model.precision,
        model.threads,
    )


def _start(settings: Settings, metrics: Metrics) -> Engine:
    # A frame of its own: `open_engine` stays open while versions are retired, and would keep their graphs.
    loaded = [load_graphs(folder, settings) for folder in _folders(settings)]
    engine = Engine([Model(graphs, settings, metrics) for graphs in loaded], settings.default_model)
    for model in engine:
        _announce(model)
    return engine


@asynccontextmanager
async def open_engine(settings: Settings, metrics: Metrics) -> AsyncIterator[Engine]:
    """Start in order: manifests verified, sessions opened, warm-up run, then ready.

    Raises:
        StartError, ManifestError: what the operator has to mend.
    """
    engine = _start(settings, metrics)
    try:
        yield engine
    finally:
        await engine.close(settings.drain_timeout)
