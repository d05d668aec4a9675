"""LitServe: FastAPI before processes that are handed batches."""

from collections.abc import Sequence
from typing import Any

import litserve
import numpy as np
from numpy.typing import NDArray

from benchmarks.frameworks.classifier import BATCH, PORT, WAIT_MS, WORKERS, Classifier, answer, decode


class Capsules(litserve.LitAPI):  # type: ignore[misc] # LitServe is not in this environment, so its class has no type
    def setup(self, device: str) -> None:
        self.classify = Classifier()

    def decode_request(self, request: dict[str, str]) -> NDArray[np.uint8]:
        return decode(request["image"])

    def batch(self, inputs: Sequence[NDArray[np.uint8]]) -> Sequence[NDArray[np.uint8]]:
        return inputs

    def predict(self, x: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self.classify.results(x)

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        return answer(output)


if __name__ == "__main__":
    api = Capsules(max_batch_size=BATCH, batch_timeout=WAIT_MS / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, generate_client_file=False)
