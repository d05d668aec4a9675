"""`capsnet`: the command line, or a line that says what to install for it."""

import sys


def main() -> int:
    """Run one command; return the process's exit status."""
    try:
        from training import cli  # noqa: PLC0415 # PyTorch, ONNX Runtime and all
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("service", "training"):
            raise
        print(
            f"capsnet: {error.name} is not installed; install the extras `train`, and `cpu` or `gpu`",
            file=sys.stderr,
        )
        return 1
    return cli.main()
