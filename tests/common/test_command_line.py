"""How programs end: with their code, and without words about what nobody waits for any more."""

import subprocess
import sys
import textwrap

SCRIPT = """
    import sys, types
    from pipeline.common.command_line import run_command

    @types.coroutine
    def wait():
        yield

    async def upload():  # as those of fsspec, which another thread waits for
        try:
            await wait()
        finally:
            raise RuntimeError("no running event loop")

    class Other:
        def __del__(self):
            raise RuntimeError("a fault of its own")

    cut_off, other = upload(), Other()
    cut_off.send(None)
    run_command(lambda: sys.exit(75))
"""


def test_an_upload_that_the_end_cuts_off_prints_no_traceback_and_other_faults_do() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], check=False, capture_output=True, text=True)
    assert done.returncode == 75
    assert "no running event loop" not in done.stderr
    assert "RuntimeError: a fault of its own" in done.stderr
