"""What people do at a terminal: Ctrl-C in `make demo`, and closing the window."""

import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import train_command

ROOT = Path(__file__).parents[3]
SMALL = "network.width=4 recipe.batch=16 schedule.log_every_images=32 schedule.evaluate_samples=64"
ENDLESS = "schedule.total_images=100000000 schedule.checkpoint_every_images=100000000"


class Terminal:
    """A command as the session leader on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            os.chdir(ROOT)
            os.execvp(command[0], command)
        self.shown = ""

    def read_until(self, words: str, seconds: float = 270) -> None:
        """Read what the terminal shows until `words` are among it, or all of it if they never come."""
        until = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < until, self.shown[-3000:]
            try:
                self.shown += os.read(self.end, 65536).decode(errors="replace")
            except OSError:  # all who had it open have ended
                return

    def wait(self) -> int:
        """Return the exit status of the command."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Path]:
    """Where a demo of our own goes; nothing that works in it is left behind."""
    folder = tmp_path / "demo"
    yield folder
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            process.kill()


@pytest.mark.timeout(900)
def test_ctrl_c_in_make_demo_saves_and_make_demo_goes_on(demo: Path) -> None:
    terminal = Terminal(["make", "demo", f"DEMO={demo}", f"TRAIN_OPTIONS={SMALL} {ENDLESS}"])
    terminal.read_until("loss D")
    os.write(terminal.end, b"\x03")
    terminal.read_until("make: ***")
    terminal.wait()
    assert "run it again to resume" in terminal.shown
    assert "Traceback" not in terminal.shown
    (checkpoint,) = demo.glob("run/checkpoints/*/state.json")
    seen = int(checkpoint.parent.name)
    options = f"{SMALL} schedule.total_images={seen + 32}"
    done = subprocess.run(
        ["make", f"{demo}/.trained", f"DEMO={demo}", f"TRAIN_OPTIONS={options}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming at image {seen} of" in done.stderr


@pytest.mark.timeout(900)
def test_a_closed_terminal_does_not_lose_the_work(faces32: Path, demo: Path) -> None:
    settings = ["schedule.log_every_images=32", *ENDLESS.split(), "schedule.evaluate_every_images=100000000"]
    terminal = Terminal(train_command(faces32, demo, *settings))
    terminal.read_until("loss D")
    os.close(terminal.end)
    assert terminal.wait() == 143
    assert len(list(demo.glob("checkpoints/*/state.json"))) == 1
