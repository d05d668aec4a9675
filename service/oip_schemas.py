"""The JSON objects of the Open Inference Protocol, for parsing and for the OpenAPI document."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from service.manifest import TensorSpec
from service.schemas import whole

# Lists that callers fill are FailFast: each of a hundred thousand wrong entries would be an error, and one is
# told. A graph has two tensors on a side, and each of a list of tensors becomes an object.
_MAX_TENSORS = 16


class _Received(BaseModel):
    # Fields and parameters that are not known are left alone, as the protocol has it.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class InputParameters(_Received):
    binary_data_size: Annotated[
        int | None,
        Field(ge=0, description="Bytes of this tensor among those after the JSON object"),
        BeforeValidator(whole),
    ] = None


class OutputParameters(_Received):
    binary_data: Annotated[
        bool | None, Field(description="Whether this output follows the JSON object as bytes")
    ] = None


class RequestParameters(_Received):
    binary_data_output: Annotated[
        bool, Field(description="Whether outputs that do not say otherwise follow the JSON object as bytes")
    ] = False


class RequestInput(_Received):
    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, BeforeValidator(whole)]], FailFast()]
    parameters: InputParameters = InputParameters()
    data: Annotated[
        list[Any] | None, Field(description="Numbers, flat in row-major order or nested to the shape")
    ] = None


class RequestOutput(_Received):
    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Received):
    id: Annotated[str | None, Field(description="Returned in the answer")] = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[RequestInput], FailFast(), Field(max_length=_MAX_TENSORS)]
    outputs: Annotated[
        list[RequestOutput],
        FailFast(),
        Field(max_length=_MAX_TENSORS, description="The outputs that are wanted; all, if none is named"),
    ] = []


class AnswerParameters(BaseModel):
    binary_data_size: int


class AnswerOutput(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: AnswerParameters | None = None
    data: Annotated[list[float] | None, Field(description="Flat in row-major order")] = None


class InferAnswer(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[AnswerOutput]


class ServerLive(BaseModel):
    live: bool


class ServerReady(BaseModel):
    ready: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ModelReady(BaseModel):
    name: str
    ready: bool


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class IndexRequest(_Received):
    ready: Annotated[bool, Field(description="Name only what is served")] = False


class ChangeRequest(_Received):
    """What of a model to load or to unload."""

    parameters: Annotated[
        dict[str, Any], Field(description="`version` names the one that is meant; without it all are")
    ] = {}


class ProtocolError(BaseModel):
    """An error under /v2."""

    error: str
