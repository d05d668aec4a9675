"""Our service beside other frameworks that give the same answers, loaded in turns on the same cores."""

import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frameworks.classifier import decode
from benchmarks.frameworks.contenders import FRAMEWORKS, Body, Framework, Setting, Work, several
from benchmarks.frameworks.processes import FrameworkError, digit, installed, running
from benchmarks.offline import open_session
from benchmarks.served import h2load, require_h2load
from benchmarks.tables import table
from benchmarks.timing import take_turns
from service.manifest import Precision
from tests.support.process import served
from training.predictor import OnnxPredictor, open_graph, run_encoder

CONCURRENCIES = (1, 8, 32, 64)
BATCH = 32
OURS = "this service"


@dataclass(frozen=True)
class _Loads:
    """What h2load sees of a server that is sent the digit in JSON."""

    folder: Path
    """For the request's body, which h2load reads from a file."""
    seconds: float

    def one(self, port: int, path: str, body: Body, callers: int) -> dict[str, float]:
        file = self.folder / "body"
        file.write_text(json.dumps(body(digit())))
        found = h2load(port, path, file, "application/json", callers, self.seconds)
        return {
            f"rate_{callers}": found.rate,
            f"p50_{callers}": found.percentile(0.5),
            f"p99_{callers}": found.percentile(0.99),
        }

    def each(self, port: int, path: str, body: Body, concurrencies: Iterable[int]) -> dict[str, float]:
        row: dict[str, float] = {}
        for callers in concurrencies:
            row |= self.one(port, path, body, callers)
        return row


@dataclass(frozen=True)
class _Contender:
    """A framework with its environment, and what its servers have to answer."""

    framework: Framework
    python: Path
    work: Work

    def running(self, setting: Setting) -> AbstractContextManager[int]:
        """The port of a server."""
        return running(self.framework, self.python, self.work, setting)

    def choose(self, threads: int, loads: _Loads) -> tuple[dict[int, Setting], dict[str, dict[str, float]]]:
        """For each load the setting with the most answers, and what each gave in one try."""
        tried: dict[Setting, dict[str, float]] = {}
        for setting in settings(threads, self.framework.waits):
            tried[setting] = self.loaded(setting, loads, CONCURRENCIES)
            rates = ", ".join(f"{tried[setting][f'rate_{callers}']:.0f}" for callers in CONCURRENCIES)
            print(f"  {self.framework.name}, {setting}: {rates} answers a second")
        best = {
            callers: max(tried, key=lambda setting: tried[setting][f"rate_{callers}"])
            for callers in CONCURRENCIES
        }
        return best, {str(setting): row for setting, row in tried.items()}

    def loaded(self, setting: Setting, loads: _Loads, concurrencies: Iterable[int]) -> dict[str, float]:
        with self.running(setting) as port:
            return loads.each(port, self.framework.path, self.framework.body, concurrencies)

    def turn(self, best: Mapping[int, Setting], loads: _Loads) -> dict[str, float]:
        """One round: each load with its best setting."""
        row: dict[str, float] = {}
        for setting in dict.fromkeys(best.values()):
            row |= self.loaded(setting, loads, [callers for callers in best if best[callers] == setting])
        return row


def run(
    model: Path,
    precision: Precision,
    seconds: float,
    threads: int,
    rounds: int,
    frameworks: tuple[Framework, ...] = FRAMEWORKS,
) -> dict[str, Any]:
    """Answers a second and times of each framework and of ours, medians of `rounds`.

    Ours is there with one worker on all threads, as it is by itself, and with one for each of several.

    Args:
        model: a folder `<models>/<name>/<version>`.
        precision: in which all of them serve it.
        seconds: of each load.
        threads: of all workers together.

    Raises:
        Missing: h2load is not installed.
        FrameworkError: what a framework did not do, with the end of its log; or the model has no such
            precision.
    """
    require_h2load()
    work = _work(model, precision)
    session = open_session(work.encoder, threads)
    batch = np.stack([decode(digit())] * BATCH)
    ours = {OURS: 1}
    if threads > 1:
        ours[f"{OURS}, {threads} workers"] = threads
    raw: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        loads = _Loads(Path(folder), seconds)
        contenders = [_Contender(each, installed(each), work) for each in frameworks]
        chosen = {each.framework.name: each.choose(threads, loads) for each in contenders}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*ours, *chosen)}
        for _ in range(rounds):
            once = take_turns({"raw": lambda: session.run(None, {"images": batch})}, seconds)["raw"]
            raw.append(BATCH / once)
            for name, workers in ours.items():
                shape = {"workers": str(workers), "threads": str(threads // workers)}
                with served(
                    model.parents[1], default_model=model.parent.name, precision=precision, **shape
                ) as service:
                    rows[name].append(loads.each(service.port, "/predict", several, CONCURRENCIES))
            for each in contenders:
                rows[each.framework.name].append(each.turn(chosen[each.framework.name][0], loads))
            for name, found in rows.items():
                print(f"  {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in found[-1].items()))
    return {
        "precision": precision,
        "threads": threads,
        "rounds": rounds,
        "seconds": seconds,
        "raw_rate": statistics.median(raw),
        "chosen": {
            each.name: {
                "version": each.requirements[0].split("==")[1],
                "settings": {str(callers): str(best) for callers, best in chosen[each.name][0].items()},
                "tried": chosen[each.name][1],
            }
            for each in frameworks
        },
        "rows": {
            name: {key: statistics.median(row[key] for row in found) for key in found[0]}
            for name, found in rows.items()
        },
    }


def _work(model: Path, precision: Precision) -> Work:
    """The graphs that a CPU is served; what is expected in fp32 comes from the plain ones."""
    predictor = OnnxPredictor(model)
    manifest = predictor.manifest
    encoders = manifest.encoders("cpu")
    if precision not in encoders:
        raise FrameworkError(f"{model} has its encoder in {', '.join(encoders)} and not in {precision}")
    encoder = (model / encoders[precision].file).resolve()
    image = decode(digit())[None]
    if precision == "fp32":
        capsules, lengths = predictor.encode(image)
    else:
        capsules, lengths = run_encoder(open_graph(encoder), image)
    drawn = predictor.decode(capsules, lengths.argmax(axis=1))
    error = np.square(drawn - image / np.float32(255)).sum()
    decoder = (model / manifest.decoder.file).resolve()
    return Work(encoder, decoder, np.array([*lengths[0], error], np.float32))


def settings(threads: int, waits: bool) -> list[Setting]:
    """One worker on all threads, or as many as threads; a batch that hardly waits, or as long as most do."""
    shapes = {(1, threads), (threads, 1)}
    return [Setting(*shape, wait) for shape in sorted(shapes) for wait in ((1, 10) if waits else (None,))]


def markdown(part: dict[str, Any]) -> str:
    rows, chosen = part["rows"], part["chosen"]
    ours = rows[OURS]
    lines = []
    for name, row in sorted(rows.items(), key=lambda entry: -entry[1]["rate_32"]):
        lines.append(
            [
                f"{name} {chosen[name]['version']}" if name in chosen else f"**{name}**",
                f"{row['p50_1']:.1f}",
                *(
                    f"{row[f'rate_{callers}']:.0f} ({row[f'rate_{callers}'] / ours[f'rate_{callers}']:.2f}x)"
                    for callers in CONCURRENCIES[1:]
                ),
                f"{row['rate_32'] / part['raw_rate']:.2f}",
                f"{row['p99_64']:.0f}",
            ]
        )
    head = ["", "1 caller, p50, ms", *(f"{callers} callers, answers/s" for callers in CONCURRENCIES[1:])]
    head += ["share of raw at 32", "64 callers, p99, ms"]
    numbers = ("1 caller", *(f"{callers} callers" for callers in CONCURRENCIES[1:]))
    settings_head = ["best setting", *numbers]
    best = [[name, *(choice["settings"].values())] for name, choice in chosen.items()]
    return "\n".join(
        [
            f"## Beside other frameworks, {part['precision']} ({part['threads']} threads, {part['machine']})",
            "",
            f"A PNG in JSON, the same {part['precision']} graphs, loaded by h2load on the same cores; "
            f"medians of {part['rounds']} rounds in which each has its turn of {part['seconds']:g} s for "
            "each load. All answer with the class, the lengths of the capsules and the error of what the "
            "longest draws; ours also says whether an image is usual. "
            f"Raw `session.run` at batch {BATCH}: {part['raw_rate']:.0f} images/s.",
            "",
            table(head, lines),
            "",
            "Ours has its defaults for every load, but for the number of workers that a row names. The "
            "others have for each the setting that gave the most answers in one try: workers x threads of "
            "each, and how long a batch, of 32 divided among the workers, may wait for more.",
            "",
            table(settings_head, best),
        ]
    )
