"""The forms of requests and answers, for parsing and for the OpenAPI document."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from service.images import Preprocess
from service.manifest import Manifest, Precision, UsedDevice
from service.tweaks import MAX_COMPONENT, Tweak


def _from_query(text: object) -> object:
    """A query parameter's text as the JSON value that it spells, so that `capsules=yes` is refused.

    `True` and `False` are how Python clients write what they were given.
    """
    if isinstance(text, str):
        if text in ("true", "false", "True", "False"):
            return text in ("true", "True")
        # int() would refuse thousands of digits, in words of its own.
        if text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 1000:
            return int(text)
    return text


def whole(number: object) -> object:
    """A whole number with a decimal point as the integer that JSON Schema takes it for."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Dimension = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Flag = Annotated[bool, BeforeValidator(_from_query)]
Component = Annotated[float, Field(ge=-MAX_COMPONENT, le=MAX_COMPONENT, allow_inf_nan=False)]
Base64 = Annotated[
    str, Field(min_length=1, description="Base64 or data URL of a PNG, JPEG, WebP, BMP or GIF")
]
DataUrl = Annotated[str, Field(description="PNG as a data URL")]
ModelReference = Annotated[
    str,
    Field(
        min_length=1,
        description="`name` (its newest version) or `name/version`, as /models lists them",
    ),
]


# docs/examples/seven.png, so that what the page offers to try works.
_EXAMPLE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAAAxUlEQVR4nGNgGDaAEUKFpD77sfTFHeyS9xQYGBg+X4UKPuk6"
    "w8DAwMDAAuGm6l/TMnSweCzLwPDntSTDozPIOhkYGBgYBA3PmDIw/Lh1XShnGi5nBP+9KIRLTuzl/2AokwlDMlv0/U1cGq1/"
    "/rPDJcfQ+m83Ky45zrM/rHBqrPu3Daec9+8PlrjkhO/+W4ZLjvn0v9vKuCTV/v3zxSUn/+BfMSMuydZ//0xwydl+QpdEClsb"
    "Hoa7X1AkWZA5F53f4TIWEwAAaRE8kJuHrgAAAAAASUVORK5CYII="
)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# Queries -------------------------------------------------------------------------------------------


class ModelQuery(_Request):
    model: ModelReference = ""
    preprocess: Annotated[
        Preprocess,
        Field(
            description="`auto` lays out any image as the training images were, and leaves one of the "
            "model's size and ground alone; `none` takes only the model's own size; `centre` lays out all. "
            "Grey levels of 16 bits may be of 8, 10, 12 or 14, as the brightest says, but with `none`. "
            "Arrays are taken as they are"
        ),
    ] = "auto"


class PredictQuery(ModelQuery):
    capsules: Annotated[Flag, Field(description="Add the capsule vectors")] = False
    reconstruction: Annotated[Flag, Field(description="Add the reconstruction from the longest capsule")] = (
        False
    )
    image: Annotated[Flag, Field(description="Add the image as the network saw it")] = False
    top_k: Annotated[
        int,
        Field(ge=1, le=1000, description="How many of the longest capsules `top` lists"),
        BeforeValidator(_from_query),  # last, or the document would not know the bounds for those of a number
    ] = 3


class ReconstructQuery(ModelQuery):
    pixels: Annotated[Flag, Field(description="Add the reconstruction as numbers in [0, 1]")] = False


# Bodies --------------------------------------------------------------------------------------------
# Their lists are FailFast: of thirty thousand wrong entries each would become an error, and one is told.


class PredictRequest(_Request):
    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [_EXAMPLE]}]})

    images: Annotated[list[Base64], FailFast(), Field(min_length=1)]


def _exactly_one(first: str, second: str) -> Any:
    return {"oneOf": [{"required": [first]}, {"required": [second]}]}


class TweakRequest(_Request):
    """Moves one dimension of the class's capsule by `delta`, or sets it to `value`."""

    model_config = ConfigDict(json_schema_extra=_exactly_one("delta", "value"))

    dimension: Dimension
    delta: Component = 0.0
    value: Component = 0.0

    @model_validator(mode="after")
    def _delta_or_value(self) -> Self:
        if len(self.model_fields_set & {"delta", "value"}) != 1:
            raise ValueError("a tweak has either a delta or a value")
        return self

    def tweak(self) -> Tweak:
        if "value" in self.model_fields_set:
            return Tweak(self.dimension, value=self.value)
        return Tweak(self.dimension, delta=self.delta)


class _Choice(_Request):
    """What every request for reconstructions holds beside its image."""

    label: Annotated[
        str, Field(alias="class", min_length=1, description="Label; the predicted one if absent")
    ] = ""
    tweaks: Annotated[list[TweakRequest], FailFast(), Field(description="Done in order")] = []


class _Source(_Request):
    """An image, or capsules as /predict returned them."""

    image: Base64 = ""
    capsules: Annotated[
        list[Annotated[list[Component], FailFast()]],
        FailFast(),
        Field(min_length=1, description="One vector for each class"),
    ] = []

    @model_validator(mode="after")
    def _image_or_capsules(self) -> Self:
        if bool(self.image) == bool(self.capsules):
            raise ValueError("give either an image or capsules")
        return self


class _SweepChoice(_Choice):
    dimensions: Annotated[
        list[Dimension],
        FailFast(),
        Field(
            min_length=1,
            json_schema_extra={"uniqueItems": True},
            description="Dimensions to sweep; all of them if absent",
        ),
    ] = []
    deltas: Annotated[
        list[Component],
        FailFast(),
        Field(min_length=1, description="The model's tweak range by its tweak step if absent"),
    ] = []

    @model_validator(mode="after")
    def _different_dimensions(self) -> Self:
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError("a dimension is swept once")
        return self


class ReconstructChoice(_Choice):
    """The part `request` beside a part `image` in multipart/form-data."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tweaks": [{"dimension": 3, "delta": 0.15}]}]})


class ReconstructRequest(_Source, _Choice):
    model_config = ConfigDict(
        json_schema_extra={
            **_exactly_one("image", "capsules"),
            "examples": [
                {
                    "image": _EXAMPLE,
                    "class": "5",
                    "tweaks": [{"dimension": 3, "delta": 0.15}],
                }
            ],
        }
    )


class SweepChoice(_SweepChoice):
    """The part `request` beside a part `image` in multipart/form-data."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"dimensions": [0, 3], "deltas": [-0.2, 0, 0.2]}]}
    )


class SweepRequest(_Source, _SweepChoice):
    model_config = ConfigDict(
        json_schema_extra={
            **_exactly_one("image", "capsules"),
            "examples": [{"image": _EXAMPLE, "dimensions": [0, 3], "deltas": [-0.2, 0, 0.2]}],
        }
    )


# Answers -------------------------------------------------------------------------------------------


class ModelName(BaseModel):
    name: str
    version: str


class RankedClass(BaseModel):
    label: str
    index: int
    length: float


class Prediction(BaseModel):
    label: str
    index: int
    length: Annotated[float, Field(description="Length of the label's capsule, the longest")]
    lengths: Annotated[list[float], Field(description="Capsule lengths in the order of the classes")]
    top: Annotated[list[RankedClass], Field(description="The longest capsules, longest first")]
    reconstruction_error: Annotated[float, Field(description="Summed squared error against the image")]
    in_distribution: Annotated[
        bool,
        Field(
            description="Whether that error, and the longest capsule's lead over the next, are usual; "
            "never for an image of a single level"
        ),
    ]
    capsules: list[list[float]] | None = None
    reconstruction: DataUrl | None = None
    image: DataUrl | None = None


class PredictAnswer(BaseModel):
    model: ModelName
    predictions: list[Prediction]


class ReconstructAnswer(BaseModel):
    model: ModelName
    label: str
    index: int
    capsule: Annotated[
        list[float],
        Field(
            description="The class's capsule after the tweaks. They may add up to components beyond "
            f"±{MAX_COMPONENT:g}, which requests may not have"
        ),
    ]
    reconstruction: DataUrl
    pixels: Annotated[list[Any] | None, Field(description="(H, W), or (H, W, 3) for colour")] = None


class SweepAnswer(BaseModel):
    model: ModelName
    label: str
    index: int
    capsule: Annotated[list[float], Field(description="The class's capsule that the sweep starts from")]
    dimensions: list[int]
    names: Annotated[
        list[str],
        Field(
            description="What each of these dimensions means for this class; empty if that is not known. "
            "/models has the measurements"
        ),
    ]
    deltas: list[float]
    reconstructions: Annotated[
        list[list[DataUrl]], Field(description="A row for each dimension, a reconstruction for each delta")
    ]


class ServedModel(BaseModel):
    name: str
    version: str
    default: Annotated[bool, Field(description="Whether it answers requests that name no model")]
    device: UsedDevice
    precision: Annotated[Precision, Field(description="Arithmetic of the encoder")]
    threads: Annotated[int, Field(description="CPU threads of a session")]
    manifest: Manifest


class ModelsAnswer(BaseModel):
    models: list[ServedModel]


class ReadyModel(BaseModel):
    name: str
    version: str
    device: UsedDevice
    precision: Annotated[Precision, Field(description="Arithmetic of the encoder")]


class ReadyAnswer(BaseModel):
    status: Literal["ready"]
    models: list[ReadyModel]


class LiveAnswer(BaseModel):
    status: Literal["live"]


class Problem(BaseModel):
    """An error after RFC 9457."""

    type: Annotated[str, Field(description="Stable name of the kind of problem, a URN")]
    title: str
    status: int
    detail: str
    received: str | None = None
    expected: str | None = None
    request_id: Annotated[
        str | None, Field(description="As in the header X-Request-ID and in the service's log")
    ] = None
