"""Versions come and go while the engine serves: whole or not at all, one change at a time."""

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, load, save

from service.engine import Engine, Graphs, load_graphs, open_engine
from service.errors import InvalidInput, RepositoryRefused, ShuttingDown, UnknownModel
from service.manifest import MANIFEST_FILE, Manifest, ManifestError, read_manifest, sha256, write_manifest
from service.metrics import Metrics
from service.protocol import find_graph
from service.repository import Repository
from service.settings import Settings
from tests.support.tiny_model import image_of, write_tiny_model

pytestmark = pytest.mark.anyio

IMAGE = image_of(3)[np.newaxis]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder of the test's own: `tiny` in version 1."""
    write_tiny_model(tmp_path / "models", "tiny", "1")
    return tmp_path / "models"


@asynccontextmanager
async def opened(models: Path, **changes: Any) -> AsyncIterator[tuple[Engine, Repository]]:
    settings = Settings.model_validate(
        {"models": models, "device": "cpu", "default_model": "tiny", "max_batch": 2, **changes}
    )
    metrics = Metrics()
    async with asyncio.timeout(30), open_engine(settings, metrics) as engine:
        yield engine, Repository(settings, engine, metrics)


def served(engine: Engine) -> list[str]:
    return [f"{model.manifest.name}/{model.manifest.version}" for model in engine]


async def states(repository: Repository) -> dict[str, tuple[str, str]]:
    """State and reason of each encoder's versions."""
    entries = await repository.index()
    return {
        f"{entry.name}/{entry.version}": (entry.state, entry.reason)
        for entry in entries
        if entry.name.endswith("-encoder")
    }


class Gate:
    """Loading that waits, off the event loop, until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = asyncio.Event()
        self.go_on = threading.Event()
        self.loads: list[str] = []
        self._loop = asyncio.get_running_loop()
        monkeypatch.setattr("service.repository.load_graphs", self._wait_and_load)

    def _wait_and_load(self, folder: Path, *arguments: Any) -> Graphs:
        self.loads.append(folder.name)
        self._loop.call_soon_threadsafe(self.started.set)
        assert self.go_on.wait(10)
        return load_graphs(folder, *arguments)


async def test_a_new_version_is_the_newest_from_the_moment_it_is_loaded(models: Path) -> None:
    """Until then it is in the index only; the old one stays beside it."""
    async with opened(models) as (engine, repository):
        write_tiny_model(models, "tiny", "10")
        assert await states(repository) == {
            "tiny-encoder/10": ("UNAVAILABLE", "not loaded"),
            "tiny-encoder/1": ("READY", ""),
        }
        assert engine.default.manifest.version == "1"
        await repository.load("tiny-decoder", {})
        assert engine.default.manifest.version == "10"
        assert served(engine) == ["tiny/10", "tiny/1"]
        assert (await engine.default.predict(IMAGE)).index.tolist() == [3]


async def test_a_model_of_another_name_can_be_loaded(models: Path) -> None:
    """The default model stays what it was, whatever the alphabet says."""
    async with opened(models, default_model=None) as (engine, repository):
        write_tiny_model(models, "a-new-one", "4")
        await repository.load("a-new-one-encoder", {})
        assert served(engine) == ["a-new-one/4", "tiny/1"]
        assert find_graph(engine, "a-new-one-encoder").version == "4"
        assert engine.default.manifest.name == "tiny"


async def test_the_index_lists_both_graphs_of_every_version(models: Path) -> None:
    """Newest first; `ready` leaves only what is served; what is served stays listed without its folder."""
    write_tiny_model(models, "colour", "1", channels=3)
    async with opened(models) as (_, repository):
        write_tiny_model(models, "tiny", "10")
        write_tiny_model(models, "tiny", "9")
        shutil.rmtree(models / "colour")
        assert [(entry.name, entry.version, entry.state) for entry in await repository.index()] == [
            ("colour-encoder", "1", "READY"),
            ("colour-decoder", "1", "READY"),
            ("tiny-encoder", "10", "UNAVAILABLE"),
            ("tiny-encoder", "9", "UNAVAILABLE"),
            ("tiny-encoder", "1", "READY"),
            ("tiny-decoder", "10", "UNAVAILABLE"),
            ("tiny-decoder", "9", "UNAVAILABLE"),
            ("tiny-decoder", "1", "READY"),
        ]
        assert {entry.version for entry in await repository.index(ready=True)} == {"1"}
        with pytest.raises(UnknownModel) as refused:
            await repository.unload("colour-encoder", {"version": "2"})
        assert refused.value.expected == "one of 1"


async def test_one_version_of_several_can_be_loaded(models: Path) -> None:
    """With the parameter `version` the others stay where they are."""
    async with opened(models) as (engine, repository):
        write_tiny_model(models, "tiny", "2")
        write_tiny_model(models, "tiny", "3")
        await repository.load("tiny-encoder", {"version": "2"})
        assert served(engine) == ["tiny/2", "tiny/1"]


async def test_a_load_retires_what_has_left_the_folder(models: Path) -> None:
    """After it, what is served is what a restart would serve."""
    async with opened(models) as (engine, repository):
        write_tiny_model(models, "tiny", "2")
        shutil.rmtree(models / "tiny" / "1")
        await repository.load("tiny-encoder", {"version": "2"})
        assert served(engine) == ["tiny/2", "tiny/1"]
        await repository.load("tiny-encoder", {})
        assert served(engine) == ["tiny/2"]


def corrupt(folder: Path) -> None:
    os.truncate(folder / "encoder.onnx", 1000)


def incomplete(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()


def unfinished(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()


def of_the_future(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))


def no_graph(folder: Path) -> None:
    (folder / "encoder.onnx").write_bytes(b"nonsense")
    _describe_again(folder)


def other_tensors(folder: Path) -> None:
    shutil.copy(folder / "decoder.onnx", folder / "encoder.onnx")
    _describe_again(folder)


def failing(folder: Path) -> None:
    """Loads, and fails as soon as it runs: the target is looked up a hundred places too far on."""
    model = load(folder / "decoder.onnx")
    nodes = model.graph.node
    (light,) = (node for node in nodes if node.output[0] == "light")
    hundred = helper.make_tensor("hundred", TensorProto.INT64, [1], [100])
    light.CopyFrom(helper.make_node("Gather", ["bands", "beyond"], ["light"], axis=0))
    nodes.insert(0, helper.make_node("Add", ["target", "hundred"], ["beyond"]))
    nodes.insert(0, helper.make_node("Constant", [], ["hundred"], value=hundred))
    save(model, folder / "decoder.onnx")
    _describe_again(folder)


def _describe_again(folder: Path) -> None:
    manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    graphs = {
        role: graph.model_copy(update={"sha256": sha256(folder / graph.file)})
        for role, graph in (("encoder", manifest.encoder), ("decoder", manifest.decoder))
    }
    write_manifest(folder, manifest.model_copy(update=graphs))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (corrupt, "encoder.onnx: sha256 is"),
        (incomplete, "decoder.onnx: missing"),
        (unfinished, "manifest.json: cannot be read"),
        (of_the_future, "schema_version"),
        (no_graph, "encoder.onnx: ONNX Runtime cannot load it"),
        (other_tensors, "encoder.onnx: inputs are digit_capsules, target; the manifest says images"),
        (failing, "decoder.onnx: ONNX Runtime cannot run it"),
    ],
)
async def test_a_broken_version_changes_nothing(models: Path, spoil: Any, words: str) -> None:
    """The refusal names file and reason, but no folder of ours; a whole version beside it waits as well."""
    async with opened(models) as (engine, repository):
        before = engine.default
        write_tiny_model(models, "tiny", "2")
        spoil(write_tiny_model(models, "tiny", "3"))
        with pytest.raises(RepositoryRefused) as refused:
            await repository.load("tiny-encoder", {})
        assert "tiny/3" in refused.value.detail
        assert words in refused.value.detail
        assert str(models.parent) not in refused.value.detail
        assert "onnxruntime_src" not in refused.value.detail
        assert served(engine) == ["tiny/1"]
        assert engine.default is before
        assert (await engine.default.predict(IMAGE)).index.tolist() == [3]
        state, reason = (await states(repository))["tiny-encoder/3"]
        assert state == "UNAVAILABLE"
        assert words in reason
        await repository.load("tiny-encoder", {"version": "2"})
        assert served(engine) == ["tiny/2", "tiny/1"]


async def test_a_refusal_tells_no_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where our models lie nor where ONNX Runtime was built is left in what somebody else wrote."""

    def load_graphs(folder: Path, _: Settings) -> Graphs:
        raise ManifestError(f"{folder / 'encoder.onnx'}: failed at /onnxruntime_src/core/session.cc:12")

    async with opened(models) as (_, repository):
        write_tiny_model(models, "tiny", "2")
        monkeypatch.setattr("service.repository.load_graphs", load_graphs)
        with pytest.raises(RepositoryRefused):
            await repository.load("tiny-encoder", {})
        _, reason = (await states(repository))["tiny-encoder/2"]
        assert reason == "tiny/2/encoder.onnx: failed at session.cc:12"


async def test_a_mended_version_can_be_loaded_after_all(models: Path) -> None:
    """A refusal leaves nothing behind."""
    async with opened(models) as (engine, repository):
        folder = write_tiny_model(models, "tiny", "2")
        incomplete(folder)
        with pytest.raises(RepositoryRefused):
            await repository.load("tiny-encoder", {})
        shutil.rmtree(folder)
        write_tiny_model(models, "tiny", "2")
        await repository.load("tiny-encoder", {})
        assert (await states(repository))["tiny-encoder/2"] == ("READY", "")
        assert engine.default.manifest.version == "2"


async def test_a_file_that_changes_while_it_is_loaded_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime has read is checked as well as what was there before."""
    async with opened(models) as (engine, repository):
        folder = write_tiny_model(models, "tiny", "2")

        def verified_then_changed(read: Path) -> Manifest:
            manifest = read_manifest(read)
            model = load(folder / "encoder.onnx")
            model.doc_string = "another"
            save(model, folder / "encoder.onnx")
            return manifest

        monkeypatch.setattr("service.engine.read_manifest", verified_then_changed)
        with pytest.raises(RepositoryRefused, match=r"encoder\.onnx: sha256"):
            await repository.load("tiny-encoder", {})
        assert served(engine) == ["tiny/1"]


async def test_what_is_served_needs_its_files_no_more(models: Path) -> None:
    """Truncated, overwritten or deleted files change no answer; a load then says what is wrong."""
    async with opened(models) as (engine, repository):
        folder = models / "tiny" / "1"
        before = await engine.default.predict(IMAGE)
        for name in ("encoder.onnx", "decoder.onnx"):
            os.truncate(folder / name, 100)
        after = await engine.default.predict(IMAGE)
        np.testing.assert_array_equal(after.capsules, before.capsules)
        np.testing.assert_array_equal(after.reconstructions, before.reconstructions)
        with pytest.raises(RepositoryRefused, match=r"encoder\.onnx: sha256"):
            await repository.load("tiny-encoder", {})
        shutil.rmtree(folder)
        again = await engine.default.predict(IMAGE)
        np.testing.assert_array_equal(again.capsules, before.capsules)


async def test_a_served_version_never_becomes_another(models: Path) -> None:
    """A changed folder under a version that is served is refused; the same content is nothing to do."""
    async with opened(models) as (engine, repository):
        before = engine.default
        await repository.load("tiny-encoder", {"version": "1"})
        assert engine.default is before
        shutil.rmtree(models / "tiny" / "1")
        write_tiny_model(models, "tiny", "1", threshold=9)
        for parameters in ({}, {"version": "1"}):
            with pytest.raises(RepositoryRefused, match="a changed model needs a new version"):
                await repository.load("tiny-encoder", parameters)
        assert engine.default is before


async def test_a_retired_version_finishes_what_it_has_begun(models: Path) -> None:
    """Requests keep the version they started on, also for their later steps; new ones get the newest."""
    async with opened(models) as (engine, repository):
        write_tiny_model(models, "tiny", "2")
        await repository.load("tiny-encoder", {})
        with engine.choose("tiny/1").in_use() as old:
            with old.in_use():  # by a request that ends first
                retiring = asyncio.create_task(repository.unload("tiny-encoder", {"version": "1"}))
                while served(engine) != ["tiny/2"]:
                    await asyncio.sleep(0)
            with pytest.raises(UnknownModel):
                engine.choose("tiny/1")
            for _ in range(3):
                assert (await old.predict(IMAGE)).index.tolist() == [3]
            assert not retiring.done()
        await retiring
        with pytest.raises(ShuttingDown):
            await old.predict(IMAGE)


async def test_a_retired_version_leaves_nothing_behind(models: Path) -> None:
    """Its sessions are freed, its threads end, and its figures are gone; it can come back."""
    settings = Settings.model_validate({"models": models, "device": "cpu", "default_model": "tiny"})
    metrics = Metrics()
    write_tiny_model(models, "tiny", "2")
    async with open_engine(settings, metrics) as engine:
        repository = Repository(settings, engine, metrics)
        model = engine.choose("tiny/1")
        await model.predict(IMAGE)
        session = weakref.ref(model._encoder._run.__self__.encoder.inference)  # type: ignore[attr-defined] # a bound method
        threads = [batcher._thread for batcher in (model._encoder, model._decoder)]
        del model
        assert b'version="1"' in metrics.exposition("")[0]
        await repository.unload("tiny-encoder", {"version": "1"})
        gc.collect()
        assert session() is None
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert b'version="1"' not in metrics.exposition("")[0]
        assert b'version="2"' in metrics.exposition("")[0]
        assert (await states(repository))["tiny-encoder/1"] == ("UNAVAILABLE", "unloaded")
        await repository.load("tiny-encoder", {"version": "1"})
        assert (await engine.choose("tiny/1").predict(IMAGE)).index.tolist() == [3]
        assert b'version="1"' in metrics.exposition("")[0]


async def test_the_default_model_keeps_a_version(models: Path) -> None:
    """A request that names no model always has one; any other model can go entirely."""
    write_tiny_model(models, "tiny", "2")
    write_tiny_model(models, "colour", "1", channels=3)
    async with opened(models) as (engine, repository):
        with pytest.raises(RepositoryRefused, match="one version must stay"):
            await repository.unload("tiny-encoder", {})
        assert served(engine) == ["colour/1", "tiny/2", "tiny/1"]
        await repository.unload("tiny-encoder", {"version": "2"})
        assert engine.default.manifest.version == "1"
        with pytest.raises(RepositoryRefused):
            await repository.unload("tiny-encoder", {"version": "1"})
        await repository.unload("colour-decoder", {"unload_dependents": False})
        assert served(engine) == ["tiny/1"]
        await repository.unload("colour-encoder", {})  # nothing is left to do


@pytest.mark.parametrize(
    ("graph", "parameters"),
    [
        ("none-encoder", {}),
        ("tiny", {}),
        ("tiny-", {}),
        ("-encoder", {}),
        ("", {}),
        ("../models/tiny-encoder", {}),
        ("tiny-encoder", {"version": "7"}),
        ("tiny-encoder", {"version": ""}),
        ("tiny-encoder", {"version": "../1"}),
    ],
)
async def test_what_is_not_there_is_named(models: Path, graph: str, parameters: dict[str, object]) -> None:
    """Neither loads nor unloads, and the error lists what there is."""
    async with opened(models) as (engine, repository):
        for change in (repository.load, repository.unload):
            with pytest.raises(UnknownModel) as refused:
                await change(graph, parameters)
            assert "1" in str(refused.value.expected) or "tiny-encoder" in str(refused.value.expected)
        assert served(engine) == ["tiny/1"]


@pytest.mark.parametrize(
    "parameters",
    [{"config": "{}"}, {"file:1/model.onnx": "aGk="}, {"verison": "1"}, {"version": 1}, {"version": None}],
)
async def test_parameters_are_never_ignored(models: Path, parameters: dict[str, object]) -> None:
    """A misspelt `version` must not mean all versions, and what is not served is refused."""
    write_tiny_model(models, "tiny", "2")
    async with opened(models) as (engine, repository):
        for change in (repository.load, repository.unload):
            with pytest.raises(InvalidInput):
                await change("tiny-encoder", parameters)
        assert served(engine) == ["tiny/2", "tiny/1"]


@pytest.mark.parametrize(
    ("graph", "parameters"),
    [
        ("x" * 999, {}),
        ("tiny-encoder", {"version": "9" * 999}),
        ("tiny-encoder", {"version": [1] * 999}),
        ("tiny-encoder", {"x" * 999: 1}),
    ],
    ids=["graph", "version", "list", "parameter"],
)
async def test_a_refusal_repeats_little_of_what_was_sent(
    models: Path, graph: str, parameters: dict[str, object]
) -> None:
    """However long a name or a version is, a hundred characters of it come back at most."""
    async with opened(models) as (_, repository):
        with pytest.raises((UnknownModel, InvalidInput)) as refused:
            await repository.load(graph, parameters)
        assert len(str(refused.value.received)) <= 102


async def test_changes_take_turns(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads of one version load it once, and an unload sent after them finds it there."""
    async with opened(models) as (engine, repository):
        gate = Gate(monkeypatch)
        write_tiny_model(models, "tiny", "2")
        changes = [asyncio.create_task(repository.load("tiny-encoder", {})) for _ in range(2)]
        await gate.started.wait()
        changes.append(asyncio.create_task(repository.unload("tiny-encoder", {"version": "1"})))
        await asyncio.sleep(0)
        assert served(engine) == ["tiny/1"]
        assert (await engine.default.predict(IMAGE)).index.tolist() == [3]  # the event loop is free
        gate.go_on.set()
        await asyncio.gather(*changes)
        assert served(engine) == ["tiny/2"]
        assert gate.loads == ["2"]


async def test_a_load_goes_on_when_its_caller_leaves(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is finished, and the next change waits for it."""
    async with opened(models) as (engine, repository):
        gate = Gate(monkeypatch)
        write_tiny_model(models, "tiny", "2")
        change = asyncio.create_task(repository.load("tiny-encoder", {}))
        await gate.started.wait()
        change.cancel()
        gate.go_on.set()
        await repository.load("tiny-encoder", {})
        assert gate.loads == ["2"]
        assert served(engine) == ["tiny/2", "tiny/1"]


async def test_a_refused_load_keeps_no_graphs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had loaded before it was refused is freed at once, not when Python looks for cycles."""
    loaded: list[weakref.ref[Graphs]] = []

    def noted(folder: Path, settings: Settings) -> Graphs:
        graphs = load_graphs(folder, settings)
        loaded.append(weakref.ref(graphs))
        return graphs

    monkeypatch.setattr("service.repository.load_graphs", noted)
    monkeypatch.setattr("service.repository.logger", logging.Logger("unheard"))  # pytest keeps what it hears
    async with opened(models) as (_, repository):
        write_tiny_model(models, "tiny", "2")
        write_tiny_model(models, "tiny", "3")
        (models / "tiny" / "3" / "encoder.onnx").write_bytes(b"")
        gc.disable()
        try:
            with contextlib.suppress(RepositoryRefused):  # `raises` would keep it
                await repository.load("tiny-encoder", {})
            for _ in range(3):  # what the event loop has still to do
                await asyncio.sleep(0)
            assert [graphs() is None for graphs in loaded] == [True]
        finally:
            gc.enable()


async def test_a_refused_load_whose_caller_has_left_is_no_fault(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why it was refused, and nothing of an exception that nobody asked for."""
    async with opened(models) as (_, repository):
        gate = Gate(monkeypatch)
        write_tiny_model(models, "tiny", "2")
        (models / "tiny" / "2" / "encoder.onnx").write_bytes(b"")
        change = asyncio.create_task(repository.load("tiny-encoder", {}))
        await gate.started.wait()
        change.cancel()
        gate.go_on.set()
        await repository.unload("tiny-encoder", {"version": "2"})  # its turn comes afterwards
        await asyncio.sleep(0)
        gc.collect()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tiny/2 cannot be loaded" in caplog.text


async def test_a_stopping_service_loads_no_more(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is ready only after the stop began is not served."""
    async with opened(models) as (engine, repository):
        gate = Gate(monkeypatch)
        write_tiny_model(models, "tiny", "2")
        change = asyncio.create_task(repository.load("tiny-encoder", {}))
        await gate.started.wait()
        engine.ready = False
        gate.go_on.set()
        with pytest.raises(ShuttingDown):
            await change
        assert served(engine) == ["tiny/1"]


async def test_a_stop_closes_what_is_being_retired(models: Path) -> None:
    """A version on its way out answers or fails what it has, within the drain like all others."""
    write_tiny_model(models, "tiny", "2")
    async with opened(models) as (engine, repository):
        with engine.choose("tiny/1").in_use() as old:
            retiring = asyncio.create_task(repository.unload("tiny-encoder", {"version": "1"}))
            while served(engine) != ["tiny/2"]:
                await asyncio.sleep(0)
            await engine.close(1)
            with pytest.raises(ShuttingDown):
                await old.predict(IMAGE)
        await retiring
