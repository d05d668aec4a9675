"""What can go wrong, whose fault it is, and which HTTP status says so.

ServiceError
├── StartError                         the operator's: the service does not start
│   └── DeviceError                    the device that was asked for is not there
└── RequestError                       one request gets no result
    ├── Unauthorized             401   no valid API key, where keys are required
    ├── RepositoryRefused        400   what is served stays as it is: a version cannot be loaded, or must stay
    ├── CallerError                    the caller's: send something else
    │   ├── MalformedBody        400   cannot be parsed at all
    │   ├── UnknownModel         404
    │   ├── NotAcceptable        406
    │   ├── BodyTimeout          408
    │   ├── TooLarge             413   over a limit of bytes, pixels or images
    │   ├── UnsupportedMediaType 415
    │   └── InvalidInput         422   can be parsed, but is not what the model takes
    └── UnableToAnswer                 ours: the same request may succeed later
        ├── InferenceFailed      500
        ├── NotWorking           503   the models' runs fail or hang: what readiness says
        ├── Overloaded           503
        ├── ShuttingDown         503
        └── TimedOut             503
"""

from typing import ClassVar


class ServiceError(Exception):
    """Root of the family."""


class StartError(ServiceError):
    """The service cannot start; the message names what the operator has to mend."""


class DeviceError(StartError):
    """The device that was asked for cannot run the model."""


class RequestError(ServiceError):
    """One request cannot be answered as asked.

    `received` and `expected` are short texts for the caller, without file paths or stack traces.
    """

    status: ClassVar[int]
    title: ClassVar[str]
    slug: ClassVar[str]
    """Last part of the problem's type, stable for programs to compare."""

    def __init__(self, detail: str, *, received: str | None = None, expected: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.received = received
        self.expected = expected

    @property
    def headers(self) -> dict[str, str]:
        """What the answer carries beside its body."""
        return {}


class Unauthorized(RequestError):
    status, title, slug = 401, "No valid API key", "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class RepositoryRefused(RequestError):
    status, title, slug = 400, "What is served stays as it is", "repository-refused"


class CallerError(RequestError):
    """The request itself is at fault."""


class MalformedBody(CallerError):
    status, title, slug = 400, "The body cannot be parsed", "malformed-body"


class UnknownModel(CallerError):
    status, title, slug = 404, "No such model", "unknown-model"


class NotAcceptable(CallerError):
    status, title, slug = 406, "No answer in an accepted form", "not-acceptable"


class BodyTimeout(CallerError):
    status, title, slug = 408, "The body did not arrive in time", "body-timeout"


class TooLarge(CallerError):
    status, title, slug = 413, "Over a size limit", "too-large"


class UnsupportedMediaType(CallerError):
    status, title, slug = 415, "Unsupported media type", "unsupported-media-type"


class InvalidInput(CallerError):
    status, title, slug = 422, "Invalid input", "invalid-input"


class UnableToAnswer(RequestError):
    """The service is at fault or too busy."""

    def __init__(self, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after
        """Seconds after which trying again makes sense."""

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class InferenceFailed(UnableToAnswer):
    status, title, slug = 500, "Inference failed", "inference-failed"


class NotWorking(UnableToAnswer):
    status, title, slug = 503, "Inference does not work", "not-working"


class Overloaded(UnableToAnswer):
    status, title, slug = 503, "Overloaded", "overloaded"


class ShuttingDown(UnableToAnswer):
    status, title, slug = 503, "Shutting down", "shutting-down"


class TimedOut(UnableToAnswer):
    status, title, slug = 503, "Not answered in time", "timed-out"
