"""ONNX Runtime sessions: on the device that was asked for, with the tensors that were promised."""

import ctypes
import logging
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.cpus import cpu_limit
from service.errors import DeviceError
from service.manifest import (
    MANIFEST_FILE,
    Datatype,
    Graph,
    Manifest,
    ManifestError,
    Precision,
    TensorSpec,
    UsedDevice,
    check_content,
)
from service.settings import Device, Settings, WantedPrecision

logger = logging.getLogger(__name__)

DTYPES: dict[Datatype, type[np.generic]] = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32}
BLOCKING_SYNC = 4
"""`CU_CTX_SCHED_BLOCKING_SYNC` of CUDA's driver interface."""
_ELEMENT_TYPES = {"UINT8": "tensor(uint8)", "INT64": "tensor(int64)", "FP32": "tensor(float)"}

# Held by whoever calls CUDA where CUDA graphs are on: while one thread captures, the calls of any other fail;
# and all graphs of a session keep what they compute on the way in the same memory.
_alone = threading.Lock()


class Runs(Protocol):
    """A graph that can be run; `run` takes and gives arrays, or rows that stay on the device."""

    def run(self, *inputs: Any) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Session:
    """One graph, loaded on one device. `run` may be called from any thread."""

    device: UsedDevice
    threads: int
    input_names: tuple[str, ...]
    inference: onnxruntime.InferenceSession
    cuda_graphs: bool = False
    """Whether each shape is captured in the first run of a thread, and replayed in its others."""

    def run(self, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Inputs and outputs in the order of the graph."""
        return tuple(self.inference.run(None, dict(zip(self.input_names, inputs, strict=True))))

    def turn(self) -> AbstractContextManager[object]:
        """Held around whatever calls the device."""
        return _alone if self.cuda_graphs else nullcontext()


class PaddedSession:
    """A session that meets few batch sizes: a batch is padded with zeros up to the next of `sizes`.

    Arrays go in and out in a single run, with one wait for the device: where several processes share a GPU,
    each wait hands it to another. See docs/decisions/0042.
    """

    def __init__(self, session: Session, sizes: Sequence[int]) -> None:
        """`sizes` in ascending order; a graph with convolutions should have one, see docs/decisions/0050."""
        self.sizes = tuple(sizes)
        self._session = session

    def run(self, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Inputs and outputs in the order of the graph.

        Raises:
            ValueError: there are more rows than the largest size.
        """
        rows = len(inputs[0])
        size = size_for(rows, self.sizes)
        if size == rows:
            return self._session.run(*inputs)
        found = self._session.run(*(_padded(given, size) for given in inputs))
        return tuple(values[:rows] for values in found)


def size_for(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds so many rows.

    Raises:
        ValueError: none does.
    """
    for size in sizes:
        if size >= rows:
            return size
    raise ValueError(f"{rows} rows, expected at most {sizes[-1]}")


def _padded(given: NDArray[Any], rows: int) -> NDArray[Any]:
    values = np.zeros((rows, *given.shape[1:]), given.dtype)
    values[: len(given)] = given
    return values


def session_threads(settings: Settings) -> int:
    """CPU threads for one operator: as set, or this worker's share of the CPU limit."""
    return settings.threads or max(1, cpu_limit() // settings.workers)


def on_one_processor(settings: Settings) -> bool:
    """Whether this worker's graphs and its event loop have one CPU between them."""
    return session_threads(settings) == 1 and settings.workers >= cpu_limit()


def resolve_device(device: Device) -> Device:
    """What `auto` comes down to where this ONNX Runtime has no CUDA at all, said once in the log."""
    if device == "auto" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        logger.info("CUDA is not in use, the CPU is: this ONNX Runtime has no CUDA provider")
        return "cpu"
    return device


def choose_precision(
    folder: Path, manifest: Manifest, wanted: WantedPrecision, device: UsedDevice
) -> Precision:
    """The precision to serve a model in.

    `auto` takes int8 on a CPU and fp16 on CUDA if the model has it and its figures are as good as fp32's,
    and fp32 otherwise. A model in no other is served in fp32, whatever is asked for, since it may stand
    beside one with some.

    Raises:
        ManifestError: the model is there in several precisions, but not in the one that was asked for.
        DeviceError: the device cannot run it.
    """
    if wanted == "auto":
        fastest = "int8" if device == "cpu" else "fp16"  # with one exception: docs/decisions/0021
        good = (found.precision for found in manifest.variants if manifest.as_good(found))
        return next((precision for precision in good if precision == fastest), "fp32")
    encoders = manifest.encoders(device)
    if len(encoders) == 1:  # a smaller model beside a larger one, which has some
        if wanted != "fp32":
            logger.info("%s is served in fp32, not in %s: it has nothing else", manifest.reference, wanted)
        return "fp32"
    if wanted not in encoders:
        raise ManifestError(
            f"{folder / MANIFEST_FILE}: CAPSNET_PRECISION is {wanted!r}, but this model has "
            f"{', '.join(encoders)}; set CAPSNET_PRECISION=auto, or export the model again"
        )
    if wanted == "int8" and device == "cuda":
        raise DeviceError(
            "CAPSNET_PRECISION is 'int8', but ONNX Runtime has no 8-bit convolution for CUDA; "
            "set CAPSNET_PRECISION=auto or CAPSNET_DEVICE=cpu"
        )
    return wanted


def cuda_options(settings: Settings, precision: Precision) -> dict[str, str]:
    """What ONNX Runtime's CUDA provider is told for a graph in `precision`. See docs/decisions/0042."""
    options = {
        "arena_extend_strategy": "kSameAsRequested",  # the arena otherwise doubles with each new batch size
        # TF32 rounds what is multiplied to ten bits, beyond fp32's tolerance. In fp16 this option would
        # take the tensor cores away from the convolutions as well.
        "use_tf32": "1" if precision == "fp16" else "0",
        "enable_cuda_graph": "1" if settings.cuda_graphs else "0",
    }
    if precision == "fp16":
        # Kernels for half precision want channels innermost, and add the bias themselves; but those that do
        # are compiled at run time, and a captured one was gone when it was to be replayed.
        options |= {"prefer_nhwc": "1", "fuse_conv_bias": "0" if settings.cuda_graphs else "1"}
    if settings.cuda_memory is not None:
        options["gpu_mem_limit"] = str(settings.cuda_memory)
    return options


def open_session(
    path: Path, graph: Graph, *, device: Device, threads: int, cuda: Mapping[str, str] | None = None
) -> Session:
    """Load a graph on `device` and check that its bytes and its tensors are those of the manifest.

    Args:
        path: the ONNX file.
        graph: what the manifest says about it.
        device: `cuda` runs on CUDA or fails; `auto` falls back to the CPU and logs why.
        threads: CPU threads for one operator.
        cuda: options of ONNX Runtime's CUDA provider, as `cuda_options` gives them.

    Raises:
        DeviceError: `cuda` was asked for and is not in use.
        ManifestError: the file cannot be loaded or is another, or the tensor it names is not as promised.
    """
    cuda = cuda or {}
    used, inference = _load_on(device, path, threads, cuda)
    # After ONNX Runtime has read it, because somebody may be writing it. It holds a copy: nothing that
    # happens to the file from here on changes an answer.
    check_content(path, graph)
    _check_tensors(path, "input", inference.get_inputs(), graph.inputs)
    _check_tensors(path, "output", inference.get_outputs(), graph.outputs)
    cuda_graphs = used == "cuda" and cuda.get("enable_cuda_graph") == "1"
    return Session(used, threads, tuple(spec.name for spec in graph.inputs), inference, cuda_graphs)


def _load_on(
    device: Device, path: Path, threads: int, cuda: Mapping[str, str]
) -> tuple[UsedDevice, onnxruntime.InferenceSession]:
    if device != "cpu":
        try:
            return "cuda", _load_on_cuda(path, threads, cuda)
        except DeviceError as error:
            if device == "cuda":
                raise
            logger.info("CUDA is not in use, the CPU is: %s", error)
    return "cpu", _load(path, threads, ["CPUExecutionProvider"])


def _load_on_cuda(path: Path, threads: int, cuda: Mapping[str, str]) -> onnxruntime.InferenceSession:
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise DeviceError(
            f"this ONNX Runtime has no CUDA provider (it has {', '.join(available)}); "
            "install the extra `gpu` in place of `cpu`, or set CAPSNET_DEVICE=cpu"
        )
    # The CUDA and cuDNN libraries of the nvidia-* wheels lie where the loader does not look by itself.
    onnxruntime.preload_dlls()
    _sleep_while_waiting()
    try:
        providers = [("CUDAExecutionProvider", dict(cuda)), "CPUExecutionProvider"]
        inference = _load(path, threads, providers)
    except ManifestError as error:
        raise DeviceError(f"CUDA cannot take the graph: {error}") from error
    in_use = inference.get_providers()
    if in_use[0] != "CUDAExecutionProvider":
        raise DeviceError(
            f"ONNX Runtime could not start CUDA and uses {', '.join(in_use)}; "
            "its own message above names the library or driver that is missing"
        )
    inference.disable_fallback()  # a failing CUDA run must fail, not move to the CPU in silence
    return inference


def _sleep_while_waiting() -> None:
    """Let threads of this process sleep while they wait for the first GPU, which is the one that is used.

    CUDA has them spin, and many workers' would take the cores from the event loops. See docs/decisions/0042.
    """
    gpu = ctypes.c_int()
    # Without the driver, or with one that knows no such call, ONNX Runtime says what there is to say.
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), 0) == 0:
            driver.cuDevicePrimaryCtxSetFlags_v2(gpu, BLOCKING_SYNC)


def _load(path: Path, threads: int, providers: Sequence[Any]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Spinning threads take the cores from the event loop between two batches.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        inference = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base but this
        raise ManifestError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    _give_back_memory()
    return inference


def _give_back_memory() -> None:
    """Let the system have what loading has left over and glibc keeps: 100 MiB after an fp32 encoder."""
    # Other C libraries have nothing of this name.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _check_tensors(path: Path, kind: str, found: Iterable[Any], expected: Iterable[TensorSpec]) -> None:
    tensors = {node.name: (node.type, tuple(node.shape)) for node in found}
    specs = {spec.name: spec for spec in expected}
    if tensors.keys() != specs.keys():
        raise ManifestError(f"{path}: {kind}s are {', '.join(tensors)}; the manifest says {', '.join(specs)}")
    for name, spec in specs.items():
        datatype, shape = tensors[name]
        # A free axis is a name or None in ONNX and -1 in the manifest.
        axes = tuple(axis if isinstance(axis, int) else -1 for axis in shape)
        if (datatype, axes) != (_ELEMENT_TYPES[spec.datatype], spec.shape):
            raise ManifestError(
                f"{path}: {kind} {name!r} is {datatype} {list(axes)}; "
                f"the manifest says {_ELEMENT_TYPES[spec.datatype]} {list(spec.shape)}"
            )


def buckets(max_batch: int) -> list[int]:
    """Powers of two up to `max_batch`, and `max_batch` itself."""
    return sorted({max_batch, *(1 << power for power in range(max_batch.bit_length()))})


def warm_up(session: Runs, graph: Graph, sizes: Iterable[int]) -> None:
    """Run the session with each of so many rows.

    The first run of a shape allocates memory and, on CUDA, chooses algorithms.
    """
    for rows in sizes:
        session.run(*(np.zeros((rows, *spec.shape[1:]), DTYPES[spec.datatype]) for spec in graph.inputs))
