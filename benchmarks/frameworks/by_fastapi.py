"""FastAPI as its tutorial has it: a typed function for each request, in a pool of threads; no batches."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.frameworks.classifier import Classifier

app = FastAPI()
classify = Classifier()


class Body(BaseModel):
    image: str


@app.post("/predict")
def predict(body: Body) -> dict[str, Any]:
    return classify([body.image])[0]
