"""PyTriton: NVIDIA's Triton Inference Server, whose batches Python processes compute."""

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.frameworks.classifier import BATCH, PORT, WAIT_MS, WORKERS, Classifier, decode


def infer_of(classify: Classifier) -> object:
    @batch  # type: ignore[untyped-decorator] # PyTriton is not in this environment
    def infer(image: NDArray[np.bytes_]) -> dict[str, NDArray[np.float32]]:
        return {"results": classify.results([decode(png) for png in image[:, 0]])}

    return infer


if __name__ == "__main__":
    settings = TritonConfig(
        http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=settings) as triton:
        triton.bind(
            model_name="capsules",
            infer_func=[infer_of(Classifier()) for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="results", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(
                max_batch_size=BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=1000 * WAIT_MS)
            ),
        )
        triton.serve()
