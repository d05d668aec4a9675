"""Health as gRPC's own protocol has it, asked of the real process by the protocol's own stub."""

import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.support.process import IMAGE, LIMIT, PNG, Served, served

OIP = "inference.GRPCInferenceService"


def channel(process: Served) -> grpc.Channel:
    return grpc.insecure_channel(process.grpc_address)


def test_health_follows_readiness_until_the_stop(tiny_models: Path) -> None:
    """SERVING for the server and its service; a watcher hears of SIGTERM at once and holds up no exit."""
    with served(tiny_models, grpc_port="0") as process, channel(process) as open_channel:
        stub = HealthStub(open_channel)
        for service in ("", OIP):
            answer = stub.Check(HealthCheckRequest(service=service), timeout=LIMIT)
            assert answer.status == HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(HealthCheckRequest(service="other"), timeout=LIMIT)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(HealthCheckRequest(service=OIP), timeout=60)
        assert next(watch).status == HealthCheckResponse.SERVING
        process.process.send_signal(signal.SIGTERM)
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
        assert list(watch) == []  # ended, and in order
        assert process.process.wait(LIMIT) == 0
        assert not any("Traceback" in line for line in process.log)


HANGS_ONCE = """
import sys, time
from service.engine import Graphs
from service.main import main
run, runs = Graphs.predict, []
def predict(graphs, inputs):
    runs.append(0)
    if len(runs) == 1:
        time.sleep(3)
    return run(graphs, inputs)
Graphs.predict = predict
sys.exit(main())
"""


def test_health_follows_what_runs_do(tiny_models: Path) -> None:
    """A watcher hears that a run does not end, and that it has ended; so do those who ask."""
    program = ("-c", HANGS_ONCE)
    with (
        served(tiny_models, program=program, grpc_port="0", request_timeout="0.5") as process,
        channel(process) as open_channel,
    ):
        watch = HealthStub(open_channel).Watch(HealthCheckRequest(service=OIP), timeout=60)
        assert next(watch).status == HealthCheckResponse.SERVING
        # By hand, since tritonclient's tests register the same messages in this process: ready is field 1.
        ask_ready = open_channel.unary_unary(f"/{OIP}/ServerReady", None, b"\x08\x01".__eq__)
        assert ask_ready(b"", timeout=LIMIT)
        assert process.client.post("/predict", content=PNG, headers=IMAGE).status_code == 503
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
        assert not ask_ready(b"", timeout=LIMIT)
        assert next(watch).status == HealthCheckResponse.SERVING
        assert ask_ready(b"", timeout=LIMIT)


@pytest.mark.parametrize(("needs_key", "allowed"), [("false", True), ("true", False)])
def test_health_needs_a_key_where_the_settings_say_so(
    tiny_models: Path, needs_key: str, allowed: bool
) -> None:
    """As over HTTP: open by default, and closed where health needs a key."""
    key = "a key of sixteen"
    settings = {"grpc_port": "0", "api_keys": key, "health_needs_key": needs_key}
    with served(tiny_models, **settings) as process, channel(process) as open_channel:
        stub = HealthStub(open_channel)
        if allowed:
            assert stub.Check(HealthCheckRequest(), timeout=LIMIT).status == HealthCheckResponse.SERVING
        else:
            with pytest.raises(grpc.RpcError) as refused:
                stub.Check(HealthCheckRequest(), timeout=LIMIT)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as refused:
                next(stub.Watch(HealthCheckRequest(), timeout=LIMIT))
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as refused:
                stub.List(HealthListRequest(), timeout=LIMIT)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        answer = stub.Check(HealthCheckRequest(), metadata=[("x-api-key", key)], timeout=LIMIT)
        assert answer.status == HealthCheckResponse.SERVING
        listed = stub.List(HealthListRequest(), metadata=[("x-api-key", key)], timeout=LIMIT).statuses
        assert {name: each.status for name, each in listed.items()} == {
            "": HealthCheckResponse.SERVING,
            OIP: HealthCheckResponse.SERVING,
        }
        assert not any("Traceback" in line for line in process.log)
