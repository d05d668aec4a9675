"""Bound and padded sessions answer as plain ones do; bound ones on buffers that stay.

They run on the CPU here; the code is the one that runs on CUDA.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service import sessions
from service.binding import BoundSession, Held, fetched
from service.manifest import Graph, TensorSpec, read_manifest, sha256
from service.sessions import PaddedSession, Session, buckets, open_session, warm_up
from tests.support.tiny_model import CLASSES, image_of

MAX_BATCH = 12  # no power of two
SIZES = buckets(MAX_BATCH)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (MAX_BATCH, 28, 28), np.uint8)
TARGETS = RANDOM.integers(0, CLASSES, MAX_BATCH)


@pytest.fixture
def graphs(tiny_models: Path) -> tuple[Graph, Graph]:
    manifest = read_manifest(tiny_models / "tiny" / "1")
    return manifest.encoder, manifest.decoder


@pytest.fixture
def plain(tiny_models: Path, graphs: tuple[Graph, Graph]) -> tuple[Session, Session]:
    folder = tiny_models / "tiny" / "1"
    encoder, decoder = (open_session(folder / graph.file, graph, device="cpu", threads=1) for graph in graphs)
    return encoder, decoder


@pytest.fixture
def bound(plain: tuple[Session, Session], graphs: tuple[Graph, Graph]) -> tuple[BoundSession, BoundSession]:
    encoder = BoundSession(plain[0], graphs[0], SIZES)
    return encoder, BoundSession(plain[1], graphs[1], SIZES, upstream=encoder)


def small_graph(folder: Path, nodes: Sequence[onnx.NodeProto], datatype: str) -> tuple[Session, Graph]:
    """A graph from `x` (B) to `y` (B) of float numbers."""
    elements = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64}
    declared = [
        helper.make_tensor_value_info(name, elements[kind], ["batch"])
        for name, kind in (("x", datatype), ("y", "FP32"))
    ]
    graph = helper.make_graph(list(nodes), "small", declared[:1], declared[1:])
    path = folder / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    x, y = (
        TensorSpec.model_validate({"name": name, "datatype": kind, "shape": (-1,)})
        for name, kind in (("x", datatype), ("y", "FP32"))
    )
    spec = Graph(file=path.name, sha256=sha256(path), opset=20, inputs=(x,), outputs=(y,))
    return open_session(path, spec, device="cpu", threads=1), spec


def test_every_batch_size_answers_as_a_plain_run(
    plain: tuple[Session, Session], bound: tuple[BoundSession, BoundSession]
) -> None:
    """Capsules, lengths and reconstructions of 1 to 12 rows, padded to 1, 2, 4, 8 or 12."""
    for rows in range(1, MAX_BATCH + 1):
        capsules, lengths = plain[0].run(IMAGES[:rows])
        (drawn,) = plain[1].run(capsules, TARGETS[:rows])
        encoded, found = bound[0].run(IMAGES[:rows])
        (redrawn,) = bound[1].run(encoded, TARGETS[:rows])
        np.testing.assert_allclose(fetched(encoded), capsules, atol=1e-6)
        np.testing.assert_allclose(fetched(found), lengths, atol=1e-6)
        np.testing.assert_allclose(fetched(redrawn), drawn, atol=1e-6)
        assert fetched(redrawn).dtype == np.float32


def test_padding_changes_no_answer(plain: tuple[Session, Session]) -> None:
    """Capsules, lengths and reconstructions of 1 to 12 rows; more than the largest size are refused."""
    encoder, decoder = (PaddedSession(session, SIZES) for session in plain)
    for rows in range(1, MAX_BATCH + 1):
        capsules, lengths = plain[0].run(IMAGES[:rows])
        (drawn,) = plain[1].run(capsules, TARGETS[:rows])
        (redrawn,) = decoder.run(capsules, TARGETS[:rows])
        for found, expected in zip(
            (*encoder.run(IMAGES[:rows]), redrawn), (capsules, lengths, drawn), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="13 rows, expected at most 12"):
        encoder.run(np.zeros((MAX_BATCH + 1, 28, 28), np.uint8))


@pytest.mark.parametrize("kind", [BoundSession, PaddedSession])
def test_only_the_buckets_reach_the_device(tmp_path: Path, kind: type) -> None:
    """A graph that gives its own batch size back never sees another than a bucket's."""
    session, graph = small_graph(
        tmp_path,
        [
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("Cast", ["size"], ["rows"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["x", "x"], ["zeros"]),
            helper.make_node("Add", ["zeros", "rows"], ["y"]),
        ],
        "FP32",
    )

    def opened(sizes: Sequence[int]) -> BoundSession | PaddedSession:
        return PaddedSession(session, sizes) if kind is PaddedSession else BoundSession(session, graph, sizes)

    runs = opened(SIZES)
    warm_up(runs, graph, SIZES)
    met = [int(fetched(*runs.run(np.zeros(rows, np.float32)))[0]) for rows in range(1, MAX_BATCH + 1)]
    assert met == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert set(met) == set(SIZES)
    alone = opened([MAX_BATCH])
    assert {int(fetched(*alone.run(np.zeros(rows, np.float32)))[0]) for rows in (1, 7, 12)} == {12}


def test_padding_holds_nothing_of_anybody(bound: tuple[BoundSession, BoundSession]) -> None:
    """Behind five rows are three empty images, whatever was there before."""
    for rows in (8, 7):
        bound[0].run(np.stack([image_of(7)] * rows))
    _, lengths = bound[0].run(np.stack([image_of(2)] * 5))
    np.testing.assert_allclose(fetched(lengths), np.eye(CLASSES)[[2] * 5], atol=1e-3)
    np.testing.assert_array_equal(fetched(replace(lengths, rows=8))[5:], 0)


def test_buffers_are_allocated_once(
    bound: tuple[BoundSession, BoundSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch size gives its answers at the same address, and nothing is allocated for them."""

    def refuse(*_: object) -> None:
        raise AssertionError("a buffer was allocated")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", refuse)
    for rows in (3, 4, 9, 12):
        first = [held.value.data_ptr() for held in bound[0].run(IMAGES[:rows])]
        bound[0].run(IMAGES[:1])
        assert [held.value.data_ptr() for held in bound[0].run(IMAGES[:rows])] == first


def test_capsules_never_leave_the_device_on_their_way_to_the_decoder(
    bound: tuple[BoundSession, BoundSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images as bytes and targets are all that is copied to it, each once."""
    copied: list[tuple[str, tuple[int, ...]]] = []
    real = onnxruntime.OrtValue.update_inplace

    def record(value: Any, array: NDArray[Any]) -> None:
        copied.append((array.dtype.name, array.shape))
        real(value, array)

    monkeypatch.setattr(onnxruntime.OrtValue, "update_inplace", record)
    encoded, _ = bound[0].run(IMAGES[:3])
    bound[1].run(encoded, TARGETS[:3])
    assert copied == [("uint8", (4, 28, 28)), ("int64", (4,))]


def test_what_was_fetched_stays_as_it_is(bound: tuple[BoundSession, BoundSession]) -> None:
    """The next run overwrites the buffer, and not the arrays that callers have."""
    _, lengths = bound[0].run(image_of(3)[np.newaxis])
    before = fetched(lengths)
    bound[0].run(image_of(5)[np.newaxis])
    assert before.argmax() == 3
    assert fetched(lengths).argmax() == 5, "held rows are those of the last run"


def test_two_that_share_a_session_share_no_buffer(
    plain: tuple[Session, Session], graphs: tuple[Graph, Graph]
) -> None:
    """What one holds is untouched by the other, and both can run at the same time."""
    first, second = (BoundSession(plain[0], graphs[0], SIZES) for _ in range(2))
    _, lengths = first.run(image_of(3)[np.newaxis])
    second.run(image_of(5)[np.newaxis])
    assert fetched(lengths).argmax() == 3

    def hammer(runs: BoundSession, index: int) -> set[int]:
        found: set[int] = set()
        for rows in [*range(1, MAX_BATCH + 1)] * 20:
            found |= set(fetched(runs.run(np.stack([image_of(index)] * rows))[1]).argmax(axis=1).tolist())
        return found

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(hammer, (first, second), (1, 8))) == [{1}, {8}]


def test_a_failed_run_leaves_the_session_usable(tmp_path: Path) -> None:
    """After an index that the graph refuses, the same bucket gives right answers."""
    table = numpy_helper.from_array(np.array([10, 20, 30], np.float32), "table")
    session, graph = small_graph(
        tmp_path,
        [
            helper.make_node("Constant", [], ["table"], value=table),
            helper.make_node("Gather", ["table", "x"], ["y"]),
        ],
        "INT64",
    )
    runs = BoundSession(session, graph, SIZES)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        runs.run(np.array([0, 1, 99]))
    assert fetched(*runs.run(np.array([2, 0, 1]))).tolist() == [30, 10, 20]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (np.zeros((2, 28, 28), np.float32), "images is float32"),
        (np.zeros((2, 28, 27), np.uint8), r"expected uint8 \(2, 28, 28\)"),
        (np.zeros((MAX_BATCH + 1, 28, 28), np.uint8), "13 rows, expected at most 12"),
    ],
)
def test_another_dtype_or_shape_is_refused(
    bound: tuple[BoundSession, BoundSession], given: NDArray[Any], named: str
) -> None:
    """Where ONNX Runtime would copy bytes as they are, the error says what was expected."""
    with pytest.raises(ValueError, match=named):
        bound[0].run(given)
    _, lengths = bound[0].run(image_of(3)[np.newaxis])
    assert fetched(lengths).argmax() == 3


def test_inputs_of_different_lengths_are_refused(bound: tuple[BoundSession, BoundSession]) -> None:
    """One target for three rows of capsules is not meant for each of them."""
    capsules, _ = bound[0].run(IMAGES[:3])
    with pytest.raises(ValueError, match=r"target is int64 \(1,\), expected int64 \(3,\)"):
        bound[1].run(capsules, TARGETS[:1])


def test_rows_held_elsewhere_are_refused(bound: tuple[BoundSession, BoundSession]) -> None:
    """The decoder reads the capsules of its own upstream, where those of as many rows are."""
    encoded, lengths = bound[0].run(IMAGES[:3])
    for wrong in (lengths, Held(lengths.session, encoded.value, 8)):
        with pytest.raises(ValueError, match="digit_capsules is held in another buffer"):
            bound[1].run(wrong, TARGETS[: wrong.rows])


def test_arrays_that_cannot_be_written(bound: tuple[BoundSession, BoundSession]) -> None:
    """Images that lie in a request's own bytes, or askew, are read from there."""
    frozen = np.frombuffer(np.stack([image_of(6)] * 4).tobytes(), np.uint8).reshape(4, 28, 28)
    for given in (frozen, np.stack([image_of(6)] * 8)[::2], frozen[:3]):
        assert set(fetched(bound[0].run(given)[1]).argmax(axis=1).tolist()) == {6}


def test_cuda_graphs_have_an_id_for_each_bucket(
    plain: tuple[Session, Session], graphs: tuple[Graph, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two buckets of a process share one, none has ONNX Runtime's own 0, and plain sessions need none."""
    used: list[Any] = []
    real = plain[1].inference.run_with_iobinding

    def record(binding: Any, options: Any) -> None:
        used.append(options and options.get_run_config_entry("gpu_graph_id"))
        real(binding, options)

    monkeypatch.setattr(plain[1].inference, "run_with_iobinding", record)
    capturing = replace(plain[1], cuda_graphs=True)
    for runs in (BoundSession(capturing, graphs[1], SIZES), BoundSession(capturing, graphs[1], buckets(4))):
        warm_up(runs, graphs[1], buckets(4))
    assert len(set(used)) == 6
    assert min(map(int, used)) >= 1
    warm_up(BoundSession(plain[1], graphs[1], [1]), graphs[1], [1])
    assert used[-1] is None


def test_cuda_graphs_leave_the_device_to_one_thread(
    plain: tuple[Session, Session], graphs: tuple[Graph, Graph]
) -> None:
    """While somebody calls the device, runs and fetches of any session wait: captures bear no other."""
    runs = BoundSession(replace(plain[0], cuda_graphs=True), graphs[0], [1])
    _, lengths = runs.run(image_of(4)[np.newaxis])
    with ThreadPoolExecutor(2) as threads:
        with replace(plain[1], cuda_graphs=True).turn():
            waiting: list[Future[Any]] = [
                threads.submit(lengths.fetch),
                threads.submit(runs.run, image_of(4)[np.newaxis]),
            ]
            assert not wait(waiting, timeout=0.1).done
        assert len(wait(waiting, timeout=10).done) == 2
    assert fetched(lengths).argmax() == 4
    assert not sessions._alone.locked()
