"""Settings come from CAPSNET_… variables and options, within bounds."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


def test_every_setting_is_described() -> None:
    """Each field has a description, from which the table of settings is made."""
    undescribed = [name for name, field in Settings.model_fields.items() if not field.description]
    assert undescribed == []


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """CAPSNET_PORT and its like are honoured."""
    monkeypatch.setenv("CAPSNET_PORT", "9001")
    monkeypatch.setenv("CAPSNET_MODELS", "elsewhere")
    settings = Settings()
    assert (settings.port, settings.models) == (9001, Path("elsewhere"))


def test_options_override_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands on the command line wins over the environment."""
    monkeypatch.setenv("CAPSNET_PORT", "9001")
    settings = Settings(_cli_parse_args=["--port", "9002", "--max-batch", "8"])
    assert (settings.port, settings.max_batch) == (9002, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("device", "tpu"),
        ("threads", 0),
        ("cuda_memory", 0),
        ("max_batch", 0),
        ("max_body", 1023),
        ("max_pixels", 0),
        ("max_images", 0),
        ("max_tweaks", 0),
        ("request_timeout", 0),
        ("request_timeout", float("inf")),
        ("drain_timeout", -1),
        ("log_level", "loud"),
    ],
)
def test_a_value_out_of_bounds_is_refused(name: str, value: object) -> None:
    """One beyond each bound is an error that names the setting."""
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({name: value})
    assert refused.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize("name", ["port", "grpc_port"])
def test_what_kubernetes_sets_is_told_apart_from_a_port(name: str) -> None:
    """For a Service of the name it sets the variable to an address: the error says so, and what helps."""
    with pytest.raises(ValidationError, match="enableServiceLinks: false"):
        Settings.model_validate({name: "tcp://10.96.12.1:8000"})


def test_two_servers_do_not_share_a_port() -> None:
    """HTTP and gRPC may each take any free port, but not the same one."""
    assert Settings(port=0, grpc_port=0).grpc_port == 0
    with pytest.raises(ValidationError, match="grpc_port must be another than port"):
        Settings(port=9000, grpc_port=9000)


def test_bodies_have_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bodies together may be as large as the largest one, and no smaller."""
    assert Settings(max_body=5000, max_bodies=5000).max_bodies == 5000
    with pytest.raises(ValidationError, match="max_bodies must be at least max_body"):
        Settings(max_body=5000, max_bodies=4999)


@pytest.mark.parametrize("value", [{"queue_length": 31}, {"decoder_queue_length": 255}])
def test_a_queue_shorter_than_a_batch_is_refused(value: dict[str, int]) -> None:
    """A queue that no full batch fits into would refuse large items for ever."""
    with pytest.raises(ValidationError, match="full batch"):
        Settings.model_validate(value)


def test_a_key_has_at_least_sixteen_characters() -> None:
    """So many are enough, and one fewer is not."""
    assert len(Settings.model_validate({"api_keys": 16 * "k"}).api_keys) == 1
    with pytest.raises(ValidationError, match="at least 16 characters"):
        Settings.model_validate({"api_keys": 15 * "k"})


@pytest.mark.parametrize("origin", ["https://a.example/", "https://a.example/page", "a.example", "https://"])
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    """An origin that could never match is refused, and says what one looks like."""
    with pytest.raises(ValidationError, match="expected scheme://host or scheme://host:port"):
        Settings(cors_origins=f"https://b.example:8443,{origin}")


def test_cuda_graphs_and_retiring_versions_exclude_one_another() -> None:
    """Each alone is taken; together they would free memory under a capture."""
    Settings(cuda_graphs=True)
    Settings(repository=True)
    with pytest.raises(ValidationError, match="cuda_graphs needs repository to be off"):
        Settings(cuda_graphs=True, repository=True)
