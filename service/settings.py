"""Every setting of the service: a `CAPSNET_…` variable or the command-line option of the same name."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")

Device = Literal["auto", "cpu", "cuda"]
WantedPrecision = Literal["auto", "fp32", "fp16", "int8"]


class Settings(BaseSettings):
    """Serve capsule networks over HTTP. Options override CAPSNET_… environment variables."""

    model_config = SettingsConfigDict(
        env_prefix="CAPSNET_",
        frozen=True,
        cli_prog_name="capsnet-serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
    )

    host: Annotated[str, Field(min_length=1, description="Address to listen on; :: is all, of IPv4 too.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes any free one.")] = 8000
    grpc_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="Port for the Open Inference Protocol over gRPC, with the extra `grpc`; "
            "0 takes any free one, unset: off. Needs workers to be 1.",
        ),
    ] = None
    models: Annotated[Path, Field(description="Folder that holds <name>/<version>/manifest.json.")] = Path(
        "models"
    )
    default_model: Annotated[
        str | None,
        Field(
            description="Model that answers when a request names none; unset: the first name in the alphabet."
        ),
    ] = None
    repository: Annotated[
        bool,
        Field(
            description="Let callers load and retire versions with the Open Inference Protocol's "
            "repository extension. Needs workers to be 1 and cuda_graphs to be off."
        ),
    ] = False
    device: Annotated[
        Device,
        Field(
            description="Where graphs run: auto takes CUDA where it works and says so; cuda never falls back."
        ),
    ] = "auto"
    precision: Annotated[
        WantedPrecision,
        Field(
            description="Arithmetic of the encoder: auto takes int8 on a CPU and fp16 on CUDA, "
            "where the manifest's figures show it to be as good as fp32."
        ),
    ] = "auto"
    cuda_graphs: Annotated[
        bool,
        Field(description="Capture what each batch size launches on CUDA once, and replay it."),
    ] = False
    cuda_memory: Annotated[
        int | None,
        Field(
            ge=16 * MIB,
            le=1 << 40,
            description="Bytes of a GPU's memory that ONNX Runtime may take for each graph of a model; "
            "unset: no limit.",
        ),
    ] = None
    workers: Annotated[
        int,
        Field(ge=1, le=64, description="Processes that serve, each with its own copy of the models."),
    ] = 1
    threads: Annotated[
        int | None,
        Field(
            ge=1,
            le=1024,
            description="CPU threads per session; unset: the container's CPU limit, shared by the workers.",
        ),
    ] = None

    max_batch: Annotated[
        int,
        Field(
            ge=1,
            le=4096,
            description="Images in one encoder batch, at most queue_length; on a GPU each is padded to it.",
        ),
    ] = 32
    queue_length: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Images that may wait for the encoder; beyond: 503. Those of one request count as a "
            "batch at most.",
        ),
    ] = 256
    max_decoder_batch: Annotated[
        int,
        Field(ge=1, le=65536, description="Capsule sets in one decoder batch, at most decoder_queue_length."),
    ] = 256
    decoder_queue_length: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Capsule sets that may wait for the decoder; beyond: 503. Those of one request count "
            "as a batch at most.",
        ),
    ] = 4096

    max_body: Annotated[
        int,
        Field(
            ge=1024, le=1024 * MIB, description="Bytes of a request body, at most max_bodies; beyond: 413."
        ),
    ] = 16 * MIB
    max_bodies: Annotated[
        int,
        Field(
            ge=1024,
            le=1 << 40,
            description="Bytes of all request bodies and gRPC messages that a process holds at a time; "
            "beyond: 503. As many of answers that clients are slow to take, and of gRPC's above 64 KiB; "
            "beyond: cut off, over gRPC UNAVAILABLE. "
            "At least max_body.",
        ),
    ] = 256 * MIB
    max_pixels: Annotated[
        int, Field(ge=1, le=1 << 30, description="Pixels of one image, read from its header; beyond: 413.")
    ] = 1 << 24
    max_request_pixels: Annotated[
        int, Field(ge=1, le=1 << 32, description="Pixels of all images of one request; beyond: 413.")
    ] = 1 << 26
    max_images: Annotated[int, Field(ge=1, le=100_000, description="Images in one request; beyond: 413.")] = (
        1024
    )
    max_tweaks: Annotated[int, Field(ge=1, le=10_000, description="Tweaks in one request; beyond: 422.")] = 64
    max_deltas: Annotated[int, Field(ge=1, le=1_000, description="Deltas in one sweep; beyond: 422.")] = 64
    max_decoding: Annotated[
        int,
        Field(
            ge=1,
            le=10_000,
            description="Requests of several images, or of a large one, that wait for decoding or are in "
            "it; beyond: 503.",
        ),
    ] = 64

    api_keys: Annotated[
        tuple[SecretStr, ...],
        NoDecode,
        Field(
            description="API keys of at least 16 characters, separated by commas; any one admits a caller. "
            "Unset: nobody needs one."
        ),
    ] = ()
    health_needs_key: Annotated[
        bool, Field(description="Ask for an API key, where there are some, on the health paths too.")
    ] = False
    metrics_needs_key: Annotated[
        bool, Field(description="Ask for an API key, where there are some, on /metrics too.")
    ] = True
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Origins, separated by commas, whose pages may call from a browser; * is any; "
            "unset: none."
        ),
    ] = ()

    head_timeout: Annotated[
        float,
        Field(gt=0, le=3600, description="Seconds for a request's head to arrive; beyond: closed."),
    ] = 10
    keep_alive: Annotated[
        int,
        Field(
            ge=1,
            le=3600,
            description="Seconds that a connection may idle between requests; a proxy must close it sooner.",
        ),
    ] = 75
    body_timeout: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            description="Seconds for a request body to arrive; beyond: 408, over gRPC DEADLINE_EXCEEDED.",
        ),
    ] = 10
    request_timeout: Annotated[
        float,
        Field(gt=0, le=3600, description="Seconds for the answer once the body is there; beyond: 503."),
    ] = 30
    answer_timeout: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            description="Seconds for a client to take an answer; beyond: cut off, over gRPC a status.",
        ),
    ] = 30
    drain_timeout: Annotated[
        float, Field(ge=0, le=3600, description="Seconds to finish requests in flight after SIGTERM.")
    ] = 8

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least severe level that is logged.")
    ] = "info"
    log_format: Annotated[
        Literal["console", "json"],
        Field(
            description="Lines for people, or one JSON object a line, but for what ONNX Runtime writes "
            "itself and for an error in the settings."
        ),
    ] = "console"
    access_log: Annotated[
        bool,
        Field(
            description="Log a line for every request but what cannot be read as HTTP, what gRPC's library "
            "refuses itself, and gRPC's own for health."
        ),
    ] = False

    @field_validator("port", "grpc_port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                "Kubernetes has set this, for a Service of the same name; set it in the container's env, "
                "or enableServiceLinks: false in the pod's spec"
            )
        return value

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: object) -> object:
        if not isinstance(value, str) or not value:
            return value or ()
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            raise ValueError("there is nothing between the commas; unset it, or leave it empty")
        return parts

    @field_validator("api_keys")
    @classmethod
    def _hard_to_guess(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key) < 16 for key in keys):
            raise ValueError("a key must have at least 16 characters")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: expected scheme://host or scheme://host:port, or * for any"
                )
        return origins

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.grpc_port and self.grpc_port == self.port:
            raise ValueError("grpc_port must be another than port, or be 0: each server needs its own")
        return self

    @model_validator(mode="after")
    def _workers_can_share(self) -> Self:
        if self.workers > 1 and self.grpc_port is not None:
            raise ValueError(
                "grpc_port needs workers to be 1: several processes cannot share gRPC's connections evenly"
            )
        if self.workers > 1 and self.repository:
            raise ValueError(
                "repository needs workers to be 1: a call reaches one process, and the others would serve "
                "other versions"
            )
        return self

    @model_validator(mode="after")
    def _nothing_frees_while_capturing(self) -> Self:
        if self.cuda_graphs and self.repository:
            raise ValueError(
                "cuda_graphs needs repository to be off: memory of a retired version may not be freed while "
                "a graph is captured"
            )
        return self

    @model_validator(mode="after")
    def _bodies_have_room(self) -> Self:
        if self.max_bodies < self.max_body:
            raise ValueError("max_bodies must be at least max_body, or a full body could never be taken")
        return self

    @model_validator(mode="after")
    def _queues_hold_a_batch(self) -> Self:
        for queue, batch in (("queue_length", "max_batch"), ("decoder_queue_length", "max_decoder_batch")):
            if getattr(self, queue) < getattr(self, batch):
                raise ValueError(f"{queue} must be at least {batch}, or a full batch could never be admitted")
        return self
