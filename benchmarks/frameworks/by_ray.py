"""Ray Serve: a proxy process before replicas, each of which gathers batches."""

from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.frameworks.classifier import BATCH, PORT, WAIT_MS, WORKERS, Classifier


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=2 * BATCH, ray_actor_options={"num_cpus": 0})
class Capsules:
    def __init__(self) -> None:
        self.classify = Classifier()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_MS / 1000)  # type: ignore[untyped-decorator] # Ray is not in this environment
    async def predict(self, images: list[str]) -> list[dict[str, Any]]:
        return self.classify(images)

    async def __call__(self, request: Request) -> Any:
        return await self.predict((await request.json())["image"])


if __name__ == "__main__":
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Capsules.bind(), blocking=True)  # type: ignore[attr-defined] # the decorator's
