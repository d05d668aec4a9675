"""Fuzz a served process by its own OpenAPI document: `python -m tests.fuzz.run`, or `make fuzz`."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.process import alone, served
from tests.support.tiny_model import write_tiny_model

HERE = Path(__file__).parent
KEY = "the key of the fuzzed service"
# So small that cases at and beyond each limit are made, and made quickly.
LIMITS = {"max_images": "16", "max_tweaks": "8", "max_deltas": "8"}


def fuzz(models: Path, examples: int, seed: int, *options: str) -> int:
    """Serve `models/<name>/<version>`, the only model there, and let schemathesis loose on it.

    Args:
        examples: cases for each operation in each phase that makes them up.
        options: more of `schemathesis run`.

    Returns:
        schemathesis' exit status: 0 where every check held.
    """
    (folder,) = models.glob("*/*/")
    with served(models, default_model=folder.parent.name, api_keys=KEY, **LIMITS) as service:
        ended = subprocess.run(  # noqa: S603 # our own interpreter and module
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml")),
                *("run", f"http://127.0.0.1:{service.port}/openapi.json"),
                *("--header", f"Authorization: Bearer {KEY}"),
                *("--checks", "all", "--max-examples", str(examples), "--seed", str(seed), *options),
            ],
            env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "CAPSNET_FUZZED_MODEL": str(folder)},
            check=False,
        )
        if ended.returncode:
            sys.stderr.writelines(service.log)
        return ended.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, help="models, of which the default is asked; a made one if absent"
    )
    parser.add_argument("--max-examples", type=int, default=300, help="cases for each operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as made:
        models = arguments.models or write_tiny_model(Path(made)).parents[1]
        models = alone(models, Path(made) / "alone").parents[1]
        return fuzz(models, arguments.max_examples, arguments.seed, *options)


if __name__ == "__main__":
    sys.exit(main())
