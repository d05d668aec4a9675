"""The Open Inference Protocol's repository extension without a transport: index, load, unload.

What is served follows the models folder, one change at a time, and only when somebody asks for it.
See docs/decisions/0016.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from service.engine import Engine, Graphs, Model, load_graphs
from service.errors import (
    DeviceError,
    InvalidInput,
    RepositoryRefused,
    RequestError,
    ShuttingDown,
    UnknownModel,
)
from service.manifest import MANIFEST_FILE, Manifest, ManifestError, read_manifest, version_folders
from service.metrics import Metrics
from service.protocol import ROLES
from service.settings import Settings

logger = logging.getLogger(__name__)

EXTENSION = "model_repository"
"""The extension's name in the server's metadata."""

# Triton's clients send it with every unload. No model here depends on another.
_WITHOUT_MEANING = "unload_dependents"

_ABSOLUTE_PATH = re.compile(r"(?<![\w.])/[^\s:,'\"]*/")


@dataclass(frozen=True)
class IndexEntry:
    """One version of a protocol model, served or only there."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: Annotated[str, Field(description="Why it is not served; empty if it is")]


class Repository:
    """The models folder beside what is served of it. Belongs to the event loop it was made on."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[RequestError | None]] = set()
        self._reasons: dict[tuple[str, str], str] = {}
        """What happened last to versions that are not served."""

    async def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Every version in the models folder or served, newest first; with `ready` only those served."""
        found = {} if ready else await self._folders()
        served = self._served()
        entries = []
        for name in sorted({*found, *served}):
            versions = {*found.get(name, ()), *served.get(name, ())}
            for role in ROLES:
                for version in sorted(versions, key=int, reverse=True):
                    is_served = version in served.get(name, ())
                    reason = "" if is_served else self._reasons.get((name, version), "not loaded")
                    state: Literal["READY", "UNAVAILABLE"] = "READY" if is_served else "UNAVAILABLE"
                    entries.append(IndexEntry(f"{name}-{role}", version, state, reason))
        return entries

    async def load(self, graph: str, parameters: Mapping[str, object]) -> None:
        """Serve what the folder of a model holds, or with the parameter `version` one version of it.

        Without it, versions whose folders are gone are retired. All of it happens or nothing, and it goes
        on if the caller leaves.

        Raises:
            UnknownModel: there is no such model, or version of it, in the folder.
            RepositoryRefused: a version cannot be served; the words say which, why, and what to mend.
            InvalidInput: another parameter.
            ShuttingDown: the service is stopping.
        """
        await self._in_turn(partial(self._load, graph, _version(parameters)))

    async def unload(self, graph: str, parameters: Mapping[str, object]) -> None:
        """Retire every version of a model, or with the parameter `version` that one.

        Requests that use it finish first. It goes on if the caller leaves.

        Raises:
            UnknownModel: there is no such model, or version of it, neither served nor in the folder.
            RepositoryRefused: it is the last version of the default model.
            InvalidInput: another parameter.
        """
        await self._in_turn(partial(self._unload, graph, _version(parameters, ignored=(_WITHOUT_MEANING,))))

    async def _in_turn(self, change: Callable[[], Awaitable[None]]) -> None:
        async def turn() -> RequestError | None:
            try:
                async with self._turn:
                    await change()
            except RequestError as error:  # which nobody asks for where the caller has left
                return error
            return None

        task = asyncio.create_task(turn())
        self._changes.add(task)  # the event loop alone does not keep a task alive
        task.add_done_callback(self._changes.discard)
        refusal = None
        try:
            refusal = await asyncio.shield(task)
            if refusal:
                raise refusal
        finally:
            # Or this frame and the error, whose frames hold graphs, would keep one another until Python looks
            # for cycles.
            del task, refusal

    async def _load(self, graph: str, version: str | None) -> None:
        name = _model_name(graph)
        there = await self._folders()
        folders = there.get(name, {})
        served = self._served().get(name, {})
        if version is not None:
            folders = {known: folder for known, folder in folders.items() if known == version}
        if not folders:
            raise _unknown(graph, version, there)
        graphs = []
        for found, folder in folders.items():
            loaded = await self._read(name, found, folder, served.get(found))
            graphs += [loaded] if loaded else []
        if not self._engine.ready:
            raise ShuttingDown("The service is stopping; it loads no more models.")
        gone = [model for found, model in served.items() if version is None and found not in folders]
        await self._change([Model(loaded, self._settings, self._metrics) for loaded in graphs], gone)

    async def _read(self, name: str, version: str, folder: Path, served: Model | None) -> Graphs | None:
        """The graphs of a version, verified and warmed up; None if it is served as the folder has it."""
        try:
            if served is None:
                return await asyncio.to_thread(load_graphs, folder, self._settings)
            await asyncio.to_thread(_require_unchanged, folder, served.manifest)
        except (ManifestError, DeviceError) as error:
            logger.warning("%s/%s cannot be loaded: %s", name, version, error)
            reason = self._without_paths(str(error))
            self._reasons[name, version] = reason
            raise RepositoryRefused(
                f"{name}/{version} cannot be loaded, and what is served stays as it is: {reason}"
            ) from error
        return None

    async def _unload(self, graph: str, version: str | None) -> None:
        name = _model_name(graph)
        served = self._served().get(name, {})
        retired = [model for found, model in served.items() if version in (None, found)]
        if not retired:
            there = await self._folders()
            folders = there.get(name, {})
            if folders if version is None else version in folders:
                return  # nothing of it is served already
            raise _unknown(graph, version, {**there, name: {*folders, *served}})
        if len(retired) == len(served) and self._engine.default in retired:
            raise RepositoryRefused(
                f"{name} is the default model, of which one version must stay: requests may name no model.",
                received=f"unload of {name}/{', '.join(model.manifest.version for model in retired)}",
                expected="a successor loaded before, or another CAPSNET_DEFAULT_MODEL",
            )
        await self._change([], retired)

    async def _change(self, added: list[Model], retired: list[Model]) -> None:
        for model in retired:
            self._reasons[model.manifest.name, model.manifest.version] = "unloaded"
        await self._engine.change(added, retired, self._settings.drain_timeout)

    async def _folders(self) -> dict[str, dict[str, Path]]:
        """Every version folder by name and version."""
        folders: dict[str, dict[str, Path]] = {}
        for folder in await asyncio.to_thread(version_folders, self._settings.models):
            folders.setdefault(folder.parent.name, {})[folder.name] = folder
        return folders

    def _served(self) -> dict[str, dict[str, Model]]:
        served: dict[str, dict[str, Model]] = {}
        for model in self._engine:
            served.setdefault(model.manifest.name, {})[model.manifest.version] = model
        return served

    def _without_paths(self, text: str) -> str:
        """An error's words without where our folders, or ONNX Runtime's sources, lie."""
        return _ABSOLUTE_PATH.sub("", text.replace(f"{self._settings.models}{os.sep}", ""))


def _unknown(graph: str, version: str | None, there: Mapping[str, Iterable[str]]) -> UnknownModel:
    """That `there`, versions by name, has not what was asked for."""
    versions = sorted(there.get(_model_name(graph), ()), key=int, reverse=True)
    if versions and version is not None:
        return UnknownModel(
            "The models folder holds no such version.",
            received=repr(version[:20]),
            expected=f"one of {', '.join(versions)}",
        )
    names = sorted(f"{name}-{role}" for name, known in there.items() if known for role in ROLES)
    return UnknownModel(
        "The models folder holds no such model.",
        received=repr(graph[:100]),
        expected=f"one of {', '.join(names)}",
    )


def _model_name(graph: str) -> str:
    """The model that a graph's name stands for: its encoder and decoder are served together or not at all."""
    name, _, role = graph.rpartition("-")
    return name if role in ROLES else ""


def _version(parameters: Mapping[str, object], ignored: Collection[str] = ()) -> str | None:
    """The parameter `version`, if it is given.

    Any other is refused, also one that the protocol would let pass: what it was meant to spare or change
    would not be.
    """
    others = [name for name in parameters if name not in ("version", *ignored)]
    if others:
        raise InvalidInput(
            "There is no such parameter of loading and unloading.",
            received=", ".join(others)[:100],
            expected="version, or none",
        )
    if "version" not in parameters:
        return None
    version = parameters["version"]
    if not isinstance(version, str):
        raise InvalidInput(
            "The parameter version is no text.",
            received=json.dumps(version, default=str)[:30],
            expected="a version as '2'",
        )
    return version


def _require_unchanged(folder: Path, manifest: Manifest) -> None:
    """Check that the folder of a served version still holds it.

    Raises:
        ManifestError: it is broken, or another model under the same version.
    """
    if read_manifest(folder) != manifest:
        raise ManifestError(
            f"{folder / MANIFEST_FILE}: is not the one that is served as this version; "
            "a changed model needs a new version"
        )
