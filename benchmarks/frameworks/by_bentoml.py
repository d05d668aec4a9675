"""BentoML: a process for each worker, which gathers its requests by what it learns of their times."""

from typing import Any

import bentoml

from benchmarks.frameworks.classifier import BATCH, WORKERS, Classifier


@bentoml.service(workers=WORKERS)
class Capsules:
    def __init__(self) -> None:
        self.classify = Classifier()

    @bentoml.api(batchable=True, max_batch_size=BATCH)  # type: ignore[untyped-decorator] # BentoML is not in this environment
    def predict(self, images: list[str]) -> list[dict[str, Any]]:
        return self.classify(images)
