"""Entry point of dcgan-launch. It can be stopped from its first moment on; launcher.py does the work.

A container's first process gets no signal that it has no handler for: the kernel drops it. Importing takes a good part
of a second, and a SIGTERM of that time would be lost; the pod would then end only when its grace time is over. So the
handlers come before every import that takes time. The image's entry point has SIGTERM and SIGINT blocked until then.
"""

import os
import signal

EARLY = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    """Run dcgan-launch. Until it has started a process, a signal ends it at once: there is nothing to save."""
    for number in EARLY:
        signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)
    from deploy.launcher import app
    from pipeline.common.command_line import run_command

    run_command(app)


def _stop(number: int, frame: object) -> None:
    os.write(2, f"stopped: {signal.Signals(number).name} came before anything was started\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
