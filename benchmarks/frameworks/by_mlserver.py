"""MLServer: the Open Inference Protocol with adaptive batching, in one process or before several."""

import asyncio

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput, TensorData

from benchmarks.frameworks.classifier import BATCH, PORT, WAIT_MS, WORKERS, Classifier, decode


class Capsules(MLModel):  # type: ignore[misc] # MLServer is not in this environment, so its class has no type
    async def load(self) -> bool:
        self.classify = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        results = self.classify.results([decode(png) for png in payload.inputs[0].data])
        output = ResponseOutput(
            name="results",
            shape=list(results.shape),
            datatype="FP32",
            data=TensorData(root=results.ravel().tolist()),
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=PORT,
        grpc_port=PORT + 1,
        metrics_endpoint=None,
        parallel_workers=0 if WORKERS == 1 else WORKERS,
    )
    model = ModelSettings(
        name="capsules",
        implementation="benchmarks.frameworks.by_mlserver.Capsules",  # its workers import it
        max_batch_size=BATCH,
        max_batch_time=WAIT_MS / 1000,
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(main())
