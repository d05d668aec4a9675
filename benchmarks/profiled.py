"""`python -m benchmarks.profiled <file> …`: the service, its event loop profiled from SIGUSR1 on."""

import cProfile
import signal
import sys

from service.main import main

if __name__ == "__main__":
    profile = cProfile.Profile()
    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())
    path = sys.argv.pop(1)
    try:
        main()
    finally:
        profile.disable()
        profile.dump_stats(path)
