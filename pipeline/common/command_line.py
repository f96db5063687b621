"""What the command lines of all programs share: their form, --version, and the exit codes of errors."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CoroutineType, FrameType
from typing import Annotated, Any, NoReturn

import typer

from pipeline.common.errors import Stopped, UnavailableError, UserError, describe_os_error
from pipeline.common.machine import use_no_signal_stack

DISTRIBUTION = "dcgan-pipeline"
"""Name of the installed package; pyproject.toml holds its version, and nothing else does."""

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise UnavailableError(
            f"{DISTRIBUTION} is not installed, so its version is unknown; pip install -e ."
        ) from None
    typer.echo(f"{DISTRIBUTION} {version}")
    raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]


def plain_app(*, completion: bool = True) -> typer.Typer:
    """Return an empty application: plain help texts, tracebacks as Python prints them, shell completion.

    Its one command or its callback declares `version: Version = False`.
    """
    return typer.Typer(
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=HELP_OPTIONS,
    )


def command_group(help: str) -> typer.Typer:
    """Return an application for subcommands, with --version; without arguments it prints its help."""
    app = plain_app()

    @app.callback(help=help, no_args_is_help=True)
    def options(version: Version = False) -> None:
        pass

    return app


INTERRUPTED = "interrupted: run the same command again to resume"


def run_command(command: Callable[[], object]) -> None:
    """Run a command line to its end and exit with our codes (docs/architecture.md, contract 6).

    `UserError` and `OSError` become one line on standard error; anything else is a bug of ours and keeps
    its traceback. Set `DCGAN_TRACEBACK=1` to see the traceback of user errors as well.
    """
    use_no_signal_stack()
    try:
        with _stop_by_exception():
            command()
    except SystemExit as end:  # typer's, after success as well
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):  # typer says nothing of it
            print(INTERRUPTED, file=sys.stderr)
        exit_with(end.code if isinstance(end.code, int) else int(end.code is not None))
    except (UserError, OSError) as error:
        if os.environ.get("DCGAN_TRACEBACK"):
            raise
        known = describe_os_error(error) if isinstance(error, OSError) else error
        print(f"{'stopped' if isinstance(known, Stopped) else 'error'}: {known}", file=sys.stderr)
        exit_with(known.exit_code)
    except _Terminated:
        print("stopped: what is finished is kept; run the same command again to resume", file=sys.stderr)
        exit_with(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        exit_with(128 + signal.SIGINT)


class _Terminated(BaseException):
    """SIGTERM. No Exception, as KeyboardInterrupt is none: who handles a bad picture must not take it for one."""


@contextmanager
def _stop_by_exception() -> Iterator[None]:
    """Let SIGTERM raise _Terminated, as Ctrl-C raises KeyboardInterrupt: else it would leave what is half-written.

    Not where several processes work together: one that waits for its peers would not end. And not over the handler
    of a program that has its own.
    """
    if os.environ.get("WORLD_SIZE", "") not in ("", "1") or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_with(code: int) -> NoReturn:
    """Exit with a code that nothing can change.

    Where several processes work together, the threads of their group may still run, and Python's teardown then now
    and then ends in std::terminate (code 134): such a process exits without it. Closing the group first does not
    help after an error: NCCL waits for peers that are gone.
    """
    if os.environ.get("WORLD_SIZE", "") not in ("", "1") and "torch.distributed" in sys.modules:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _say_nothing_of_transfers()
    sys.exit(code)


def _say_nothing_of_transfers() -> None:
    """Print no traceback of what the end of this program cuts off, such as uploads of other threads.

    fsspec's coroutines are closed when the interpreter ends, without their loop, which they may not be able to bear.
    """
    report = sys.unraisablehook

    def report_others(  # by then modules may be empty: nothing is looked up in them
        unraisable: Any, report: Callable[[Any], object] = report, kind: type = CoroutineType
    ) -> None:
        if not isinstance(unraisable.object, kind):
            report(unraisable)

    sys.unraisablehook = report_others
