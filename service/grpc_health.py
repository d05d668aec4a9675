"""`grpc.health.v1`: what load balancers and orchestrators ask of a gRPC server. Needs the extra `grpc`."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.errors import Unauthorized

SERVICE: str = health.SERVICE_NAME


class Health(health.aio.HealthServicer):  # type: ignore[misc] # published without type information
    """SERVING while the service is ready, until it begins to stop.

    Args:
        check_key: raises Unauthorized for callers without an API key, where health needs one.
    """

    def __init__(self, check_key: Callable[[str, grpc.aio.ServicerContext], None]) -> None:
        super().__init__()
        self._check_key = check_key
        self._ending = asyncio.Event()
        self._services: tuple[str, ...] = ()

    async def serve(self, server: grpc.aio.Server, *services: str) -> None:
        """Answer for the server as a whole and for these services of it."""
        self._services = ("", *services)
        for service in services:
            await self.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def follow(self, is_ready: Callable[[], bool]) -> None:
        """Look every second whether it is ready; to be cancelled at the stop."""
        before = True
        while True:
            if (now := is_ready()) != before:
                status = "SERVING" if now else "NOT_SERVING"
                for service in self._services:
                    await self.set(service, health_pb2.HealthCheckResponse.ServingStatus.Value(status))
            before = now
            await asyncio.sleep(1)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 # gRPC's name
        await self._admit("Check", context)
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 # gRPC's name
        await self._admit("Watch", context)
        parts = [asyncio.create_task(part) for part in (super().Watch(request, context), self._ending.wait())]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()

    async def List(self, _: Any, context: Any) -> Any:  # noqa: N802 # gRPC's name
        await self._admit("List", context)
        asked = {service: health_pb2.HealthCheckRequest(service=service) for service in self._services}
        found = {service: await super(Health, self).Check(asked[service], context) for service in asked}
        return health_pb2.HealthListResponse(statuses=found)

    async def _admit(self, method: str, context: Any) -> None:
        try:
            self._check_key(f"/{SERVICE}/{method}", context)
        except Unauthorized as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.detail)

    def end_watches(self) -> None:
        """Let go of everybody who watches: otherwise a stop would wait for them until its limit."""
        self._ending.set()
