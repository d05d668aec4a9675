"""The engine answers in plain arrays what the tiny model's arithmetic gives by hand, on every path."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from service import engine as engine_module
from service import sessions
from service.batching import Arrays
from service.binding import BoundSession
from service.context import begin_record
from service.engine import Engine, Graphs, Model, load_graphs, open_engine, way_of
from service.errors import (
    DeviceError,
    InferenceFailed,
    NotWorking,
    Overloaded,
    ShuttingDown,
    StartError,
    UnknownModel,
)
from service.manifest import (
    MANIFEST_FILE,
    ManifestError,
    Precision,
    UsedDevice,
    Variant,
    manifest_checksum,
    model_folders,
    read_manifest,
    sha256,
    write_manifest,
)
from service.metrics import Metrics
from service.sessions import PaddedSession, Session
from service.settings import Settings
from tests.support.tiny_model import CLASSES, DIMENSIONS, band, capsules_of, image_of, write_tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True, params=["plain", "padded", "bound"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain runs, as on a CPU; padded ones, as on CUDA; or bound buffers, as with CUDA graphs."""
    monkeypatch.setattr(engine_module, "way_of", lambda *_: request.param)
    return str(request.param)


def settings(models: Path, **changes: object) -> Settings:
    return Settings.model_validate({"models": models, "device": "cpu", "default_model": "tiny", **changes})


async def test_predict(tiny_models: Path) -> None:
    """Capsules, lengths, winner, reconstruction and error are those of the bands, image by image."""
    images = np.stack([image_of(3), image_of(7, level=102)])
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        found = await engine.default.predict(images)
    assert found.index.tolist() == [3, 7]
    np.testing.assert_allclose(found.lengths[1], 0.4 * np.eye(CLASSES)[7], atol=1e-3)
    np.testing.assert_allclose(found.capsules[1, 7], 0.4 * np.eye(DIMENSIONS)[0], atol=1e-3)
    np.testing.assert_allclose(found.reconstructions, images / 255, atol=1e-3)
    np.testing.assert_allclose(found.errors, 0, atol=1e-3)


async def test_the_reconstruction_error_is_a_sum_over_the_scaled_image(tiny_models: Path) -> None:
    """Twelve white pixels that no capsule draws add exactly twelve to the error."""
    image = image_of(3)
    image[26, 4:16] = 255  # below every band
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        found = await engine.default.predict(image[np.newaxis])
    assert found.errors[0] == pytest.approx(12, abs=1e-2)
    assert found.in_distribution.tolist() == [False]


async def test_a_blank_image_is_unusual(tiny_models: Path) -> None:
    """On an image of one level there is nothing of a class, however well it is drawn."""
    images = np.stack([image_of(3, level=0), image_of(3)])
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        found = await engine.default.predict(images)
    np.testing.assert_allclose(found.errors, 0, atol=1e-3)
    assert found.in_distribution.tolist() == [False, True]


async def test_who_asks_for_drawings_gets_them_beside_who_does_not(tiny_models: Path) -> None:
    """One image of a batch is drawn and judged as if it were alone, though the other is only encoded."""
    image = image_of(3, level=102)[np.newaxis]
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        model = engine.default
        batches, run = [], model._encoder._run

        def noted(inputs: Arrays) -> Arrays:
            batches.append(inputs[1].tolist())
            return run(inputs)

        model._encoder._run = noted
        found, *_ = await asyncio.gather(model.predict(image), model.encode(image), model.predict(image))
    assert batches[0] == [True, False]
    np.testing.assert_allclose(found.reconstructions, image / 255, atol=1e-3)
    assert found.in_distribution.tolist() == [True]


async def test_reconstruct_draws_the_target_and_masks_the_others(tiny_models: Path) -> None:
    """Only the target's capsule is drawn, however long the others are."""
    capsules = np.zeros((2, CLASSES, DIMENSIONS), np.float32)
    capsules[:, 5, 2] = 0.5
    capsules[:, 8] = 1
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        drawn = await engine.default.reconstruct(capsules, np.array([5, 8]))
    assert drawn[0, band(5), 4:24] == pytest.approx(0.5)
    assert drawn[0].sum() == pytest.approx(0.5 * 40)
    assert drawn[1, band(8), 4:24] == pytest.approx(1)


async def test_a_sweep_is_drawn_dimension_by_delta(tiny_models: Path) -> None:
    """Each reconstruction shows its delta, in one batch of all of them."""
    capsules = np.zeros((CLASSES, DIMENSIONS), np.float32)
    capsules[4, 0] = 0.5
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        drawn = await engine.default.sweep(capsules, 4, [0, 9, 15], [-0.25, 0, 0.25])
    assert drawn.shape == (3, 3, 28, 28)
    np.testing.assert_allclose(drawn[:, :, band(4).start, 4], [[0.25, 0.5, 0.75]] * 3, atol=1e-6)


async def test_a_colour_model_is_served(tiny_models: Path) -> None:
    """With three channels images and reconstructions are (H, W, 3)."""
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        found = await engine.choose("colour").predict(image_of(2, channels=3)[np.newaxis])
    assert found.index.tolist() == [2]
    assert found.reconstructions.shape == (1, 28, 28, 3)
    assert found.errors[0] == pytest.approx(0, abs=1e-2)


async def test_models_are_chosen_by_name_and_version(tiny_models: Path) -> None:
    """A name means its newest version, and no name means the default model."""
    async with open_engine(settings(tiny_models), Metrics()) as engine:

        def chosen(reference: str) -> str:
            manifest = engine.choose(reference).manifest
            return f"{manifest.name}/{manifest.version}"

        assert chosen("") == "tiny/2"
        assert chosen("tiny") == "tiny/2"
        assert chosen("tiny/1") == "tiny/1"
        assert chosen("colour") == "colour/1"
        for unknown in ("none", "tiny/3", "tiny/", "/1", "tiny/1/2", "/"):
            with pytest.raises(UnknownModel) as refused:
                engine.choose(unknown)
            assert "tiny/2, tiny/1" in str(refused.value.expected)


async def test_the_tenth_version_is_newer_than_the_ninth(tmp_path: Path) -> None:
    """Versions are numbers, not texts."""
    for version in ("9", "10"):
        write_tiny_model(tmp_path, "tiny", version)
    async with open_engine(settings(tmp_path), Metrics()) as engine:
        assert engine.default.manifest.version == "10"


async def test_without_a_setting_the_first_name_is_the_default(tiny_models: Path) -> None:
    """The default model does not depend on the order of a directory listing."""
    async with open_engine(settings(tiny_models, default_model=None), Metrics()) as engine:
        assert engine.default.manifest.name == "colour"


async def test_an_unknown_default_model_stops_the_start(tiny_models: Path) -> None:
    """The error names the setting and the models that there are."""
    with pytest.raises(StartError, match=r"CAPSNET_DEFAULT_MODEL is .nope.; .* colour, tiny"):
        async with open_engine(settings(tiny_models, default_model="nope"), Metrics()):
            pass


async def test_an_empty_models_folder_stops_the_start(tmp_path: Path) -> None:
    """The error says what was expected where."""
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StartError, match=r"holds no model; expected <name>/<version>/manifest\.json"):
            model_folders(folder)


async def test_a_worker_serves_what_all_of_them_agreed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves out what came later, and does not start where something was changed or removed."""
    folder = write_tiny_model(tmp_path, version="1")
    agreed = {str(folder): manifest_checksum(folder)}
    monkeypatch.setenv("_CAPSNET_MODELS", json.dumps(agreed))
    write_tiny_model(tmp_path, version="2")
    async with open_engine(settings(tmp_path), Metrics()) as engine:
        assert [model.manifest.version for model in engine] == ["1"]
    with (folder / MANIFEST_FILE).open("a") as manifest:
        manifest.write("\n")
    with pytest.raises(ManifestError, match=r"tiny/1/manifest\.json: .* since the start"):
        async with open_engine(settings(tmp_path), Metrics()):
            pass
    shutil.rmtree(folder)
    with pytest.raises(ManifestError, match=r"tiny/1/manifest\.json: .* since the start"):
        async with open_engine(settings(tmp_path), Metrics()):
            pass


async def test_what_is_no_version_is_passed_over(tmp_path: Path) -> None:
    """Files, and folders whose names are no numbers, as an export leaves while it is writing."""
    (tmp_path / ".export-a1b2" / "mnist").mkdir(parents=True)
    version = write_tiny_model(tmp_path, "tiny", "1")
    (version.parent / "2").touch()
    assert model_folders(tmp_path) == [version]


async def test_one_broken_version_stops_the_start(tiny_models: Path, tmp_path: Path) -> None:
    """A folder that is incomplete is not passed over in silence."""
    models = Path(shutil.copytree(tiny_models, tmp_path / "models"))
    (models / "tiny" / "1" / "decoder.onnx").unlink()
    with pytest.raises(ManifestError, match=r"decoder\.onnx: missing"):
        async with open_engine(settings(models), Metrics()):
            pass


async def test_arrays_of_another_form_never_reach_a_batch(tiny_models: Path) -> None:
    """A wrong dtype or shape is an error of its caller alone, before the queue."""
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        for wrong in (
            np.zeros((1, 28, 28), np.float32),
            np.zeros((1, 28, 27), np.uint8),
            np.zeros((0, 28, 28), np.uint8),
        ):
            with pytest.raises(ValueError, match="expected uint8"):
                await engine.default.predict(wrong)  # type: ignore[arg-type] # the wrong dtype is the point


async def test_a_closed_engine_refuses_and_is_not_ready(tiny_models: Path) -> None:
    """After its lifetime nothing runs any more."""
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        assert engine.ready
        model = engine.default
    assert not engine.ready
    with pytest.raises(ShuttingDown):
        await model.predict(image_of(0)[np.newaxis])


async def test_a_run_that_does_not_end_is_waited_for_once(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What outlasted the limit of one close does not hold up the next, so that a process can end."""
    ends = threading.Event()
    monkeypatch.setattr(Graphs, "predict", lambda *_: ends.wait())
    try:
        patient = settings(tiny_models, drain_timeout=3600)
        async with asyncio.timeout(20), open_engine(patient, Metrics()) as engine:
            asked = asyncio.create_task(engine.default.predict(image_of(3)[np.newaxis]))
            await asyncio.sleep(0)
            await engine.close(0.1)
            with pytest.raises(ShuttingDown):
                await asked
    finally:
        ends.set()


def broken(*_: object) -> Any:
    raise RuntimeError("the device is broken")


async def test_what_is_no_number_is_no_answer(tiny_models: Path) -> None:
    """An encoder whose sums overflow fails, as a device does that breaks, and makes the service unready."""

    class Overflowing:
        def run(self, images: Any) -> list[Any]:
            count = len(images)
            return [
                np.full((count, CLASSES, DIMENSIONS), np.nan, np.float32),
                np.full((count, CLASSES), np.nan, np.float32),
            ]

    async with open_engine(settings(tiny_models), Metrics()) as engine:
        model = engine.default
        graphs: Graphs = model._encoder._run.__self__  # type: ignore[attr-defined] # a bound method
        model._encoder._run = replace(graphs, encoder=Overflowing()).predict  # type: ignore[arg-type] # all that is asked of it
        for ask in 2 * (model.predict, model.encode):
            with pytest.raises(InferenceFailed):
                await ask(image_of(3)[np.newaxis])
        with pytest.raises(NotWorking):
            engine.require_ready(model)


async def test_a_failing_decoder_makes_it_unready_until_it_draws_again(tiny_models: Path) -> None:
    """Whoever asks after each outage sets off the trial that ends it, and the trial is none of their own."""
    async with open_engine(settings(tiny_models), Metrics()) as engine:
        model = engine.default
        healthy = model._decoder._run
        for _ in range(2):
            model._decoder._run = broken
            for _ in range(3):
                with pytest.raises(InferenceFailed):
                    await model.reconstruct(capsules_of(3), np.array([3]))
            stages = begin_record()
            for mended in (False, True):
                with pytest.raises(NotWorking):
                    engine.require_ready(model)
                if mended:
                    model._decoder._run = healthy
                assert model._trial
                await model._trial
            engine.require_ready(model)
            assert not stages


async def test_the_decoders_queue_has_its_own_limit(tiny_models: Path) -> None:
    """Of three callers one is drawn for and one waits, whatever the encoder's queue would take."""
    narrow = settings(tiny_models, max_decoder_batch=1, decoder_queue_length=1)
    async with open_engine(narrow, Metrics()) as engine:
        model = engine.default
        go_on, run = threading.Event(), model._decoder._run

        def wait_and_run(inputs: Arrays) -> Arrays:
            assert go_on.wait(10)
            return run(inputs)

        model._decoder._run = wait_and_run
        callers = [asyncio.create_task(model.reconstruct(capsules_of(3), np.array([3]))) for _ in range(3)]
        await asyncio.sleep(0)
        go_on.set()
        answers = await asyncio.gather(*callers, return_exceptions=True)
    assert Overloaded in map(type, answers)


async def test_models_can_be_put_together_by_hand(tiny_models: Path) -> None:
    """A script can load one folder and serve it without the rest."""
    chosen = settings(tiny_models)
    model = Model(load_graphs(tiny_models / "tiny" / "1", chosen), chosen, Metrics())
    engine = Engine([model], None)
    assert [served.manifest.name for served in engine] == ["tiny"]
    assert (await engine.default.predict(image_of(6)[np.newaxis])).index.tolist() == [6]
    await engine.close(1)


async def test_every_way_is_the_one_it_is_called(tiny_models: Path, way: str) -> None:
    """Encoder and decoder are run as plain, padded or bound sessions, all three of them in the same way."""
    graphs = load_graphs(tiny_models / "tiny" / "1", settings(tiny_models))
    kind = {"plain": Session, "padded": PaddedSession, "bound": BoundSession}[way]
    assert {type(runs) for runs in (graphs.encoder, graphs.drawer, graphs.decoder)} == {kind}


def test_a_device_is_warmed_up_twice(tiny_models: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each size that it is to meet, since the second run of one takes other memory; a CPU once."""
    sizes = []

    def warm_up(_: object, __: object, given: Iterable[int]) -> None:
        sizes.append(list(given))

    monkeypatch.setattr(engine_module, "warm_up", warm_up)
    load_graphs(tiny_models / "tiny" / "1", settings(tiny_models, max_batch=5, max_decoder_batch=3))
    once = [1, 2, 4, 5]
    expected = [once, once, [1, 2, 3]] if way == "plain" else [[5, 5], [5, 5], [1, 2, 3, 1, 2, 3]]
    assert sizes == expected


@pytest.mark.parametrize(("workers", "few"), [(1, 8), (2, 32)])
async def test_all_run_in_one_batch_where_halves_gain_nothing(
    tiny_models: Path, way: str, monkeypatch: pytest.MonkeyPatch, workers: int, few: int
) -> None:
    """Padded to the largest, a batch takes as long with one image as with all; on a CPU eight are few.

    A worker that has one of two CPUs has no other for its event loop while a half runs: there 32 are few.
    """
    monkeypatch.setattr("service.sessions.cpu_limit", lambda: 2)
    chosen = settings(tiny_models, max_batch=40, workers=workers)
    model = Model(load_graphs(tiny_models / "tiny" / "1", chosen), chosen, Metrics())
    assert model._encoder._few == (few if way == "plain" else 40)
    assert model._decoder._few == 8
    await Engine([model], None).close(1)


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_with_one_graph_on_the_cpu_nothing_is_padded(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, devices: tuple[UsedDevice, UsedDevice]
) -> None:
    """`auto` may find CUDA for the decoder and not for the encoder: arrays go to both."""
    asked: list[str] = []

    def way_of(device: str, _: Settings) -> str:
        asked.append(device)
        return "plain"

    opened = iter(devices)

    def open_session(*arguments: Any, device: str, **options: Any) -> Session:
        return replace(sessions.open_session(*arguments, device="cpu", **options), device=next(opened))

    monkeypatch.setattr(engine_module, "way_of", way_of)
    monkeypatch.setattr(engine_module, "open_session", open_session)
    load_graphs(tiny_models / "tiny" / "1", settings(tiny_models))
    assert asked == ["cpu"]


def test_a_device_is_given_few_sizes_and_cuda_graphs_their_buffers() -> None:
    """A CPU takes batches as they are; what CUDA captures must find its buffers where they were."""
    assert way_of("cpu", Settings()) == "plain"
    assert way_of("cuda", Settings()) == "padded"
    assert way_of("cuda", Settings(cuda_graphs=True)) == "bound"


@pytest.mark.parametrize("way", ["bound"], indirect=True)
@pytest.mark.usefixtures("way")
async def test_convolutions_meet_one_batch_size_on_a_device(tiny_models: Path) -> None:
    """Whatever the batch, the same buffers: for another size than the last, CUDA plans convolutions anew."""
    graphs = load_graphs(tiny_models / "tiny" / "1", settings(tiny_models))
    places = set()
    for rows in (1, 2, 5, settings(tiny_models).max_batch):
        capsules, lengths = graphs.encoder.run(np.stack([image_of(3)] * rows))
        assert graphs.drawer is not None
        (drawn,) = graphs.drawer.run(capsules, np.full(rows, 3))
        places.add((capsules.value.data_ptr(), lengths.value.data_ptr(), drawn.value.data_ptr()))
    assert len(places) == 1


async def test_buffers_that_do_not_fit_stop_the_start(
    tiny_models: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the model and the device, and has ONNX Runtime's reason."""

    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", full)
    folder = tiny_models / "tiny" / "1"
    if way != "bound":
        load_graphs(folder, settings(tiny_models))
    else:
        with pytest.raises(DeviceError, match=r"tiny.1: cpu has no room for its batches: out of memory"):
            load_graphs(folder, settings(tiny_models))


async def test_models_do_not_disturb_one_another(tiny_models: Path) -> None:
    """Predictions and drawings of several models at once, in batches of all sizes, are everybody's own."""
    async with open_engine(settings(tiny_models, max_batch=8, max_decoder_batch=8), Metrics()) as engine:

        async def predict(name: str, index: int, rows: int) -> None:
            channels = 3 if name == "colour" else 1
            found = await engine.choose(name).predict(np.stack([image_of(index, channels=channels)] * rows))
            assert set(found.index.tolist()) == {index}
            np.testing.assert_allclose(found.errors, 0, atol=1e-2)

        async def draw(name: str, index: int, rows: int) -> None:
            capsules = np.zeros((rows, CLASSES, DIMENSIONS), np.float32)
            capsules[:, index, 0] = 0.5
            drawn = await engine.choose(name).reconstruct(capsules, np.full(rows, index))
            np.testing.assert_allclose(drawn[:, band(index), 4:24], 0.5)

        await asyncio.gather(
            *(
                ask(name, (rows + offset) % CLASSES, rows)
                for rows in range(1, 20)
                for offset, name in enumerate(("tiny/1", "tiny/2", "colour"))
                for ask in (predict, draw)
            )
        )


def with_blind_variant(tiny_models: Path, tmp_path: Path, precision: Precision, agreement: float) -> Path:
    """A models folder whose model has a variant that sees nothing, of such an agreement."""
    folder = tmp_path / "models" / "tiny" / "1"
    shutil.copytree(tiny_models / "tiny" / "1", folder)
    manifest = read_manifest(folder)
    blind = write_tiny_model(tmp_path / "other") / "encoder.onnx"  # the same, except for what it does not see
    model = onnx.load(blind)
    weights = next(node for node in model.graph.node if node.output[0] == "weights").attribute[0]
    weights.t.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weights.t)), "weights"))
    file = folder / "encoder.variant.onnx"
    onnx.save(model, file)
    graph = manifest.encoder.model_copy(update={"file": file.name, "sha256": sha256(file)})
    mistakes = manifest.measured.test_mistakes
    variant = Variant(
        precision=precision, encoder=graph, test_mistakes=mistakes, agreement=agreement, psnr=60
    )
    write_manifest(folder, manifest.model_copy(update={"variants": (variant,)}))
    return tmp_path / "models"


async def test_the_chosen_precision_is_served(tiny_models: Path, tmp_path: Path) -> None:
    """The variant's own file answers, and the model says in which precision."""
    models = with_blind_variant(tiny_models, tmp_path, "int8", agreement=50)
    for wanted, served, light in (("auto", "fp32", 1), ("int8", "int8", 0)):
        async with open_engine(settings(models, precision=wanted), Metrics()) as engine:
            found = await engine.default.predict(image_of(3)[np.newaxis])
        assert engine.default.precision == served
        assert found.lengths[0, 3] == pytest.approx(light, abs=1e-3)


@pytest.mark.parametrize(("agreement", "light"), [(100, 0), (50, 1)])
async def test_a_cpu_is_served_the_variant_in_fp32(
    tiny_models: Path, tmp_path: Path, agreement: float, light: float
) -> None:
    """The file for CPUs answers where its figures are as good, and the encoder's own where they are not."""
    models = with_blind_variant(tiny_models, tmp_path, "fp32", agreement)
    for wanted in ("auto", "fp32"):
        async with open_engine(settings(models, precision=wanted), Metrics()) as engine:
            found = await engine.default.predict(image_of(3)[np.newaxis])
        assert engine.default.precision == "fp32"
        assert found.lengths[0, 3] == pytest.approx(light, abs=1e-3)
