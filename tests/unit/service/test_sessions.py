"""Sessions run on what was asked for, within the container's limits, with the promised tensors."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from service.errors import DeviceError
from service.manifest import Graph, Manifest, ManifestError, Measured, TensorSpec, Variant, read_manifest
from service.sessions import (
    BLOCKING_SYNC,
    buckets,
    choose_precision,
    cuda_options,
    on_one_processor,
    open_session,
    resolve_device,
    session_threads,
    warm_up,
)
from service.settings import Settings
from tests.support.mnist import ROOT
from tests.support.process import alone
from tests.support.tiny_model import DIMENSIONS, image_of

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")


@pytest.fixture
def folder(tiny_models: Path) -> Path:
    return tiny_models / "tiny" / "1"


@pytest.fixture
def encoder(folder: Path) -> Graph:
    return read_manifest(folder).encoder


def test_a_graph_runs(folder: Path, encoder: Graph) -> None:
    """Outputs come in the manifest's order, for every batch size."""
    session = open_session(folder / encoder.file, encoder, device="cpu", threads=1)
    warm_up(session, encoder, buckets(3))
    for rows in (1, 2, 7):
        capsules, lengths = session.run(np.stack([image_of(4)] * rows))
        assert capsules.shape == (rows, 10, DIMENSIONS)
        np.testing.assert_allclose(lengths, np.eye(10)[[4] * rows], atol=1e-3)


_OPEN_AND_TRIM = """
import ctypes
import sys
from pathlib import Path
from service.manifest import read_manifest
from service.sessions import open_session
from tests.support.status import status_of

folder = Path(sys.argv[1])
encoder = read_manifest(folder).encoder
session = open_session(folder / encoder.file, encoder, device="cpu", threads=1)
before = status_of("self", "VmRSS")
ctypes.CDLL(None).malloc_trim(0)
print((before - status_of("self", "VmRSS")) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc, and asks glibc")
def test_loading_leaves_nothing_over(tmp_path: Path) -> None:
    """Once the shipped fp32 encoder is loaded, its process keeps no memory that nothing uses."""
    folder = alone(ROOT / "models", tmp_path)
    # In a process in which nothing else was freed before.
    command = [sys.executable, "-c", _OPEN_AND_TRIM, str(folder)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603 # ours
    assert float(found.stdout) < 20, "MiB that could have been given back; the weights themselves are 27"


def test_warm_up_covers_the_batch_sizes(folder: Path, encoder: Graph) -> None:
    """Powers of two up to the largest batch, and that batch itself, have run before the first request."""

    class Recorder:
        def __init__(self) -> None:
            self.rows: list[int] = []

        def run(self, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> tuple[()]:
            assert images.dtype == np.uint8
            assert images.shape[1:] == (28, 28)
            self.rows.append(len(images))
            return ()

    recorder = Recorder()
    warm_up(recorder, encoder, buckets(24))
    assert recorder.rows == [1, 2, 4, 8, 16, 24]


def test_threads_do_not_spin(folder: Path, encoder: Graph) -> None:
    """Idle threads leave the cores to the event loop, and their number is what was asked for."""
    session = open_session(folder / encoder.file, encoder, device="cpu", threads=2)
    options = session.inference.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 2


@pytest.mark.parametrize(
    ("settings", "threads"), [({}, 8), ({"workers": 3}, 2), ({"workers": 16}, 1), ({"threads": 5}, 5)]
)
def test_workers_share_the_cpus(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], threads: int
) -> None:
    """Of 8 CPUs each of 3 workers takes 2, and each of 16 takes one; a number that is set counts for each."""
    monkeypatch.setattr("service.sessions.cpu_limit", lambda: 8)
    assert session_threads(Settings.model_validate({"device": "cpu", **settings})) == threads


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"workers": 2}, True),
        ({"workers": 3}, True),
        ({"workers": 2, "threads": 2}, False),
        ({"threads": 1}, False),
        ({}, False),
    ],
)
def test_a_worker_may_have_one_processor(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], expected: bool
) -> None:
    """Of 2 CPUs each of 2 workers has one for all it does; a lone one has the other for its event loop."""
    monkeypatch.setattr("service.sessions.cpu_limit", lambda: 2)
    assert on_one_processor(Settings.model_validate({"device": "cpu", **settings})) == expected


@without_cuda
def test_cuda_never_falls_back(folder: Path, encoder: Graph) -> None:
    """Without a CUDA provider `cuda` fails and says what to install; `auto` takes the CPU and says so."""
    with pytest.raises(DeviceError, match="extra `gpu`"):
        open_session(folder / encoder.file, encoder, device="cuda", threads=1)
    assert open_session(folder / encoder.file, encoder, device="auto", threads=1).device == "cpu"
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cuda") == "cuda"


@without_cuda
def test_a_cuda_provider_that_does_not_start_is_an_error(
    folder: Path, encoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime drops a provider that cannot start with no more than a message; `cuda` must not."""
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    # The real loader, asked for a provider that this build lacks, warns and goes on with the CPU.
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(DeviceError, match="CPU"):
        open_session(folder / encoder.file, encoder, device="cuda", threads=1)


@pytest.mark.skipif(not HAS_CUDA, reason="this ONNX Runtime has no CUDA")
def test_threads_sleep_while_they_wait_for_the_gpu(folder: Path, encoder: Graph) -> None:
    """CUDA's driver was told so for the GPU that the session is on."""
    open_session(folder / encoder.file, encoder, device="cuda", threads=1)
    flags, active = ctypes.c_uint(), ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
    assert active.value
    assert flags.value & 0b111 == BLOCKING_SYNC  # the bits of how to wait


def test_a_failing_run_on_cuda_is_not_repeated_on_the_cpu(
    folder: Path, encoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would load the graph anew on the CPU after an error, and stay there."""
    on_cpu = open_session(folder / encoder.file, encoder, device="cpu", threads=1).inference
    on_cpu.enable_fallback()
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(on_cpu, "get_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: on_cpu)
    session = open_session(folder / encoder.file, encoder, device="cuda", threads=1)
    assert session.device == "cuda"
    assert not session.inference._enable_fallback


def test_what_the_cuda_provider_is_told(
    folder: Path, encoder: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 keeps all its bits, fp16 the tensor cores; the arena grows by what is asked for, up to a limit."""
    usual = cuda_options(Settings(), "fp32")
    assert usual == {
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
    }
    half = {"use_tf32": "1", "prefer_nhwc": "1", "fuse_conv_bias": "1"}
    assert cuda_options(Settings(), "fp16") == usual | half
    assert cuda_options(Settings(cuda_graphs=True), "fp16")["fuse_conv_bias"] == "0"
    limited = cuda_options(Settings(cuda_memory=1 << 30, cuda_graphs=True), "fp32")
    assert limited == usual | {"gpu_mem_limit": "1073741824", "enable_cuda_graph": "1"}

    given: list[object] = []

    class Started(RuntimeError):
        pass

    def start(path: Path, options: object, providers: list[object]) -> None:
        given.extend(providers)
        raise Started

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    with pytest.raises(DeviceError):
        open_session(folder / encoder.file, encoder, device="cuda", threads=1, cuda=limited)
    assert given == [("CUDAExecutionProvider", limited), "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "pixels"}, "images"),
        ({"datatype": "FP32"}, "'images' is tensor(uint8)"),
        ({"shape": (-1, 28, 27)}, "'images' is tensor(uint8) [-1, 28, 28]"),
        ({"shape": (1, 28, 28)}, "'images' is"),
    ],
)
def test_a_tensor_that_is_not_as_promised_is_named(
    folder: Path, encoder: Graph, change: dict[str, object], named: str
) -> None:
    """The error names file, tensor, what it is and what the manifest says."""
    spec = TensorSpec.model_validate(encoder.inputs[0].model_dump() | change)
    with pytest.raises(ManifestError) as refused:
        open_session(
            folder / encoder.file,
            encoder.model_copy(update={"inputs": (spec,)}),
            device="cpu",
            threads=1,
        )
    assert "encoder.onnx" in str(refused.value)
    assert named in str(refused.value)


def test_a_missing_output_is_named(folder: Path, encoder: Graph) -> None:
    """A graph with another set of outputs than the manifest's is refused with both."""
    graph = encoder.model_copy(update={"outputs": encoder.outputs[:1]})
    with pytest.raises(
        ManifestError, match="digit_capsules, capsule_lengths; the manifest says digit_capsules"
    ):
        open_session(folder / encoder.file, graph, device="cpu", threads=1)


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, encoder: Graph) -> None:
    """ONNX Runtime's complaint comes with the file's name."""
    (tmp_path / "encoder.onnx").write_bytes(b"nonsense")
    with pytest.raises(ManifestError, match=r"encoder\.onnx: ONNX Runtime cannot load it"):
        open_session(tmp_path / "encoder.onnx", encoder, device="cpu", threads=1)


def with_variants(folder: Path, **figures: float) -> Manifest:
    """The folder's manifest with an 8-bit and a half-precision encoder of these figures."""
    manifest = read_manifest(folder)
    return manifest.model_copy(
        update={
            "measured": Measured(test_images=10_000, test_mistakes=40, parity_error=0),
            "variants": tuple(
                Variant.model_validate(
                    {
                        "precision": precision,
                        "encoder": manifest.encoder,
                        "test_mistakes": 42,
                        "agreement": 99.9,
                        "psnr": 40,
                        **figures,
                    }
                )
                for precision in ("fp16", "int8")
            ),
        }
    )


def test_auto_takes_the_fastest_as_good_variant(folder: Path) -> None:
    """At the limits of error, agreement and PSNR a variant is served, beyond any one of them fp32 is."""
    manifest = with_variants(folder)
    assert choose_precision(folder, manifest, "auto", "cpu") == "int8"
    assert choose_precision(folder, manifest, "auto", "cuda") == "fp16"
    for worse in ({"test_mistakes": 43}, {"agreement": 99.89}, {"psnr": 39.9}):
        manifest = with_variants(folder, **worse)
        assert choose_precision(folder, manifest, "auto", "cpu") == "fp32"
        assert choose_precision(folder, manifest, "int8", "cpu") == "int8", "who asks for it gets it"
    assert choose_precision(folder, read_manifest(folder), "auto", "cpu") == "fp32"


def test_a_cpu_has_its_own_fp32(folder: Path) -> None:
    """The variant in fp32 is for CPUs, as long as its figures are as good; elsewhere the encoder is."""
    manifest = with_variants(folder)
    own = manifest.encoder.model_copy(update={"file": "encoder.cpu.onnx"})
    for figures, file in (({}, own.file), ({"psnr": 39.9}, manifest.encoder.file)):
        variant = manifest.variants[0].model_copy(update={"precision": "fp32", "encoder": own, **figures})
        both = manifest.model_copy(update={"variants": (variant, *manifest.variants)})
        assert both.encoders("cpu")["fp32"].file == file
        assert both.encoders("cuda")["fp32"].file == manifest.encoder.file
        assert list(both.encoders("cpu")) == list(both.encoders("cuda")) == ["fp32", "fp16", "int8"]
        assert choose_precision(folder, both, "auto", "cpu") == "int8"
        alone = manifest.model_copy(update={"variants": (variant,)})
        assert choose_precision(folder, alone, "auto", "cpu") == "fp32"
        assert choose_precision(folder, alone, "int8", "cpu") == "fp32", "it has nothing else"


def test_a_precision_that_is_not_there(folder: Path) -> None:
    """A precision that a model with variants lacks is an error that says which; int8 never goes to CUDA."""
    manifest = with_variants(folder)
    manifest = manifest.model_copy(update={"variants": manifest.variants[1:]})
    with pytest.raises(ManifestError, match="CAPSNET_PRECISION is 'fp16', but this model has fp32, int8;"):
        choose_precision(folder, manifest, "fp16", "cuda")
    with pytest.raises(DeviceError, match="no 8-bit convolution for CUDA"):
        choose_precision(folder, with_variants(folder), "int8", "cuda")


def test_a_model_without_variants_is_served_in_fp32(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model in fp32 alone does not keep those beside it from their precision, and the log says so."""
    caplog.set_level("INFO")
    for wanted in ("fp32", "auto"):
        assert choose_precision(folder, read_manifest(folder), wanted, "cpu") == "fp32"
    assert "nothing else" not in caplog.text
    assert choose_precision(folder, read_manifest(folder), "int8", "cpu") == "fp32"
    assert "is served in fp32, not in int8: it has nothing else" in caplog.text
