"""Load a served process: `python -m tests.soak.run`, or `make soak`.

A soak mixes every kind of request, a tenth of them hostile, at a concurrency over capacity, and judges:
statuses, answers, memory, descriptors, threads, and how long accepted requests took. `--goodput` compares
what is answered to many callers with what is answered to few.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from service.manifest import read_manifest
from tests.soak.traffic import Honest, Hostile, honest, hostile, noise
from tests.soak.wire import Answer, Connection, request
from tests.support.encoded import encode
from tests.support.process import Served, alone, served
from tests.support.status import status_of
from tests.support.tiny_model import write_tiny_model

MAX_BATCH = 32
QUEUE_LENGTH = 64  # so few that the callers of a soak are more than fit
BODY_TIMEOUT = 2.0  # seconds; slow callers run into it
SETTINGS = {
    "max_batch": str(MAX_BATCH),
    "queue_length": str(QUEUE_LENGTH),
    "body_timeout": str(BODY_TIMEOUT),
    "max_body": str(1 << 20),
}
CALLERS = 96
HOSTILE = 0.1  # of all requests

# Memory is flat when the last third of a run takes no more than the third before it, but for this.
MEMORY_NOISE = 4 << 20  # bytes
MEMORY_GROWTH = 0.02

# A batch's turn takes longer than its graphs run: gathering, scattering, and the event loop's share of the
# interpreter, which the load makes as busy as it can be.
TURN = 2.0


@dataclass
class Seen:
    """What came of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of accepted single images, by Server-Timing
    waited: list[float] = field(default_factory=list)  # in the queue, of the same
    batches: list[float] = field(default_factory=list)  # the graphs' runs, of the same
    vitals: list["Vitals"] = field(default_factory=list)


@dataclass(frozen=True)
class Vitals:
    memory: int  # bytes that are resident
    descriptors: int
    threads: int


def vitals(pid: int) -> Vitals:
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 # a count alone
    return Vitals(1024 * status_of(pid, "VmRSS"), descriptors, status_of(pid, "Threads"))


async def soak(service: Served, folder: Path, duration: float, *, seed: int = 0) -> Seen:
    """Load `service`, which serves the model in `folder`, for `duration` seconds."""
    kinds = await honest(service.port, folder)
    enemies = hostile(encode(noise(read_manifest(folder), 1)[0]), BODY_TIMEOUT)
    seen = Seen()
    end = time.monotonic() + duration
    chance = random.Random(seed)  # noqa: S311 # no secret
    before = vitals(service.process.pid)
    callers = [
        asyncio.create_task(_caller(service.port, kinds, enemies, seen, end, random.Random(chance.random())))  # noqa: S311 # no secret
        for _ in range(CALLERS)
    ]
    while not all(caller.done() for caller in callers):
        await asyncio.wait(callers, timeout=max(0.1, duration / 180))
        seen.vitals.append(vitals(service.process.pid))
    await asyncio.gather(*callers)
    await _settled(service, before, seen)
    return seen


async def _caller(
    port: int,
    kinds: Sequence[Honest],
    enemies: Sequence[Hostile],
    seen: Seen,
    end: float,
    chance: random.Random,
) -> None:
    connection = Connection(port)
    while time.monotonic() < end:
        if chance.random() < HOSTILE:
            enemy = chance.choice(enemies)
            try:
                seen.statuses[f"hostile {await enemy(port)}"] += 1
            except Exception as error:  # whatever it is, it is a fault to report
                seen.faults.append(f"{enemy.__qualname__}: {error!r}")
            continue
        kind = chance.choice(kinds)
        try:
            answer = await connection.exchange(kind.data)
        except Exception as error:  # the same
            seen.faults.append(f"{kind.name}: {error!r}")
            connection.close()
            continue
        seen.statuses[str(answer.status)] += 1
        _judge(kind, answer, seen)
        if answer.status == 503:
            await asyncio.sleep(chance.random() * 0.05)  # over capacity even so
    connection.close()


def _judge(kind: Honest, answer: Answer, seen: Seen) -> None:
    if answer.status == 503:
        if "retry-after" not in answer.headers:
            seen.faults.append(f"{kind.name}: refused without Retry-After")
        return
    try:
        if kind.name != "metrics":
            kind.check(answer)
    except AssertionError as error:
        seen.faults.append(f"{kind.name}: {error}")
        return
    if kind.name == "one":
        stages = answer.stages
        seen.seconds.append(stages["total"])
        seen.waited.append(stages["queue"])
        seen.batches.append(stages["encoder"] + stages.get("decoder", 0.0))  # fp16 draws in one run


async def _settled(service: Served, before: Vitals, seen: Seen) -> None:
    """When the callers have gone, so has everything that was there for them."""
    connection = Connection(service.port)
    deadline = time.monotonic() + 5 * BODY_TIMEOUT
    while True:
        text = (await connection.exchange(request("GET", "/metrics"))).body.decode()
        figures = dict(re.findall(r"^(capsnet_\S+) (\S+)$", text, re.MULTILINE))
        left = {
            name: float(value) for name, value in figures.items() if name.startswith("capsnet_queue_depth")
        }
        left["requests"] = float(figures["capsnet_requests_in_flight"]) - 1  # but for this one
        left["descriptors"] = vitals(service.process.pid).descriptors - before.descriptors - 1  # the same
        if all(count <= 0 for count in left.values()):
            break
        if time.monotonic() > deadline:
            seen.faults.append(f"left behind: {left}")
            break
        await asyncio.sleep(0.1)
    connection.close()


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)))]


def verdict(seen: Seen, *, steady: bool) -> list[str]:
    """Everything that is wrong.

    Args:
        steady: judge memory, threads and times too, for which a run has to last.
    """
    wrong = [f"{count} times: {fault}" for fault, count in Counter(seen.faults).most_common(20)]
    accepted = {"200", "503"}
    wrong += [
        f"status {status}" for status in seen.statuses if "hostile" not in status and status not in accepted
    ]
    wrong += [f"status {status}" for status in seen.statuses if re.search(r"5(?!03)\d\d", status)]
    if not seen.statuses["503"]:
        wrong.append("nothing was refused: the load was not over capacity")
    if not steady:
        return wrong
    third = len(seen.vitals) // 3
    middle, last = seen.vitals[third : 2 * third], seen.vitals[2 * third :]
    was, became = (statistics.median(moment.memory for moment in part) for part in (middle, last))
    if became - was > max(MEMORY_NOISE, MEMORY_GROWTH * was):
        wrong.append(f"memory grew from {was:.0f} to {became:.0f} bytes after the warm-up")
    if max(moment.threads for moment in last) > max(moment.threads for moment in middle):
        wrong.append("threads became more after the warm-up")
    if (slowest := percentile(seen.seconds, 0.99)) > (limit := bound(seen)):
        wrong.append(f"p99 of accepted images is {slowest:.3f} s, over {limit:.3f} s")
    return wrong


def bound(seen: Seen) -> float:
    """Seconds that the configured queue allows: what may wait ahead, what runs, and one's own batch."""
    turns = math.ceil(QUEUE_LENGTH / MAX_BATCH) + 2
    return TURN * turns * percentile(seen.batches, 0.99)


def report(seen: Seen) -> dict[str, object]:
    memory = [moment.memory >> 20 for moment in seen.vitals]
    return {
        "statuses": dict(sorted(seen.statuses.items())),
        "memory_mib": memory[:: max(1, len(memory) // 30)],
        "threads": [seen.vitals[0].threads, seen.vitals[-1].threads],
        "descriptors_at_most": max(moment.descriptors for moment in seen.vitals),
        "accepted_images": len(seen.seconds),
        "p50_ms": round(1000 * percentile(seen.seconds, 0.5), 1),
        "p99_ms": round(1000 * percentile(seen.seconds, 0.99), 1),
        "p99_queue_ms": round(1000 * percentile(seen.waited, 0.99), 1),
        "p99_batch_ms": round(1000 * percentile(seen.batches, 0.99), 1),
        "bound_ms": round(1000 * bound(seen), 1),
    }


# Goodput ---------------------------------------------------------------------------------------------


async def goodput(
    port: int, folder: Path, *, rounds: int, seconds: float, patient: bool
) -> dict[str, object]:
    """Answers a second to 32 and to 512 callers, in turns, each with one image at a time.

    Args:
        patient: whether who is refused waits as Retry-After says, or tries again at once.
    """
    data = request("POST", "/predict", encode(noise(read_manifest(folder), 1)[0]), content_type="image/png")
    figures: dict[int, list[tuple[float, float]]] = {32: [], 512: []}
    for _ in range(rounds):
        for callers, measured in figures.items():
            statuses: Counter[int] = Counter()
            started = time.monotonic()
            end = started + seconds
            tasks = [
                asyncio.create_task(_asks(port, data, statuses, end, patient=patient)) for _ in range(callers)
            ]
            await asyncio.sleep(seconds)
            answered, refused = statuses[200] / seconds, statuses[503] / seconds
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            measured.append((answered, refused))
    medians = {callers: statistics.median(good for good, _ in found) for callers, found in figures.items()}
    return {
        "patient": patient,
        "answered_a_second": {
            callers: [round(good) for good, _ in found] for callers, found in figures.items()
        },
        "refused_a_second": {callers: [round(bad) for _, bad in found] for callers, found in figures.items()},
        "ratio": round(medians[512] / medians[32], 3),
    }


async def _asks(port: int, data: bytes, statuses: Counter[int], end: float, *, patient: bool) -> None:
    connection = Connection(port)
    try:
        while time.monotonic() < end:
            answer = await connection.exchange(data)
            statuses[answer.status] += 1
            if answer.status == 503 and patient:
                await asyncio.sleep(float(answer.headers["retry-after"]))
    finally:
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, help="models, of which the default is asked; a made one if absent"
    )
    parser.add_argument("--duration", type=float, default=900, help="seconds of a soak")
    parser.add_argument("--goodput", action="store_true", help="measure goodput instead")
    parser.add_argument("--rounds", type=int, default=3, help="of goodput, 32 and 512 callers in each")
    parser.add_argument("--seconds", type=float, default=4, help="of goodput for each measurement")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        models = arguments.models or write_tiny_model(Path(made)).parents[1]
        folder = alone(models, Path(made) / "alone")
        models, name = folder.parents[1], folder.parent.name
        if arguments.goodput:
            with served(models, default_model=name) as service:
                for patient in (True, False):
                    run = goodput(
                        service.port,
                        folder,
                        rounds=arguments.rounds,
                        seconds=arguments.seconds,
                        patient=patient,
                    )
                    print(json.dumps(uvloop.run(run)), flush=True)
            return 0
        with served(models, default_model=name, **SETTINGS) as service:
            seen = uvloop.run(soak(service, folder, arguments.duration, seed=arguments.seed))
    print(json.dumps(report(seen), indent=1))
    wrong = verdict(seen, steady=arguments.duration >= 60)
    print("\n".join(wrong) or "nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
