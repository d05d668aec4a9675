"""`capsnet-serve`: signals, settings, then one process that serves or one that keeps several; exit code."""

import contextlib
import logging
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the service with the options of the command line; returns the process's exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_at_once)
    try:
        return _run()
    finally:
        _forget_what_cannot_be_written()


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """End a start that is under way: nothing has been accepted yet.

    Process 1 of a container would never see a signal for which it has no handler. An exception in place of
    this could be lost in the imports, where Python only prints those that callbacks raise.
    """
    os._exit(0)


def _run() -> int:
    # NumPy would begin a thread for each processor of the machine, whatever the container's limit.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    # Imported here because that takes a second, in which a signal may come already.
    from pydantic import ValidationError  # noqa: PLC0415

    from service import logs  # noqa: PLC0415
    from service.errors import StartError  # noqa: PLC0415
    from service.handover import Notice, worker_channel  # noqa: PLC0415
    from service.manifest import ManifestError  # noqa: PLC0415
    from service.settings import Settings  # noqa: PLC0415

    try:
        settings = Settings(_cli_parse_args=sys.argv[1:])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "".join(f"CAPSNET_{str(part).upper()}: " for part in first["loc"][:1])
        # Where settings contradict one another the input is all of them, keys included.
        told = first["loc"] and first["loc"][0] != "api_keys"
        received = f" (received {first['input']!r})" if told else ""
        _complain(f"{name}{first['msg']}{received}")
        return 2
    logs.configure(settings)
    channel = worker_channel()
    if channel is None:  # of several processes, the first says it
        logs.warn_of_unknown_settings(os.environ)
    try:
        if settings.workers > 1 and channel is None:
            from service.workers import supervise  # noqa: PLC0415 # without what serving needs

            supervise(settings)
        else:
            try:
                from service.server import run  # noqa: PLC0415 # ONNX Runtime and all
            except ModuleNotFoundError as error:
                if error.name != "onnxruntime":
                    raise
                raise StartError("onnxruntime is not installed; install the extra `cpu` or `gpu`") from error

            run(settings, channel)
    except (StartError, ManifestError) as error:
        if channel is None and settings.log_format == "json":
            logging.getLogger("service.main").error("%s", error)
        elif channel is None:
            _complain(str(error))
        else:  # of all workers that cannot start for the same reason, one line
            channel.sendall(bytes([Notice.FAILED]) + str(error).encode())
        return 1
    return 0


def _complain(reason: str) -> None:
    with contextlib.suppress(OSError):  # the exit code says it too
        sys.stderr.write(f"capsnet-serve: {reason}\n")


def _forget_what_cannot_be_written() -> None:
    """Let log lines that found no room on the disk not change the exit code when Python tries again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
