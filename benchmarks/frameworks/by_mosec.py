"""Mosec: an HTTP server in Rust before Python processes that are handed batches."""

from typing import Any

from mosec import Server, Worker

from benchmarks.frameworks.classifier import BATCH, WAIT_MS, WORKERS, Classifier


class Capsules(Worker):  # type: ignore[misc] # Mosec is not in this environment, so its class has no type
    def __init__(self) -> None:
        self.classify = Classifier()

    def forward(self, data: list[dict[str, str]]) -> list[dict[str, Any]]:
        return self.classify([body["image"] for body in data])


if __name__ == "__main__":
    server = Server()
    server.append_worker(Capsules, num=WORKERS, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
