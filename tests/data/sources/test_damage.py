"""Damaged files of every format: one line, no traceback, no hang, little memory, and never a wrong count."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import pytest
from damage import CONTAINERS, COUNT, Container, pictures

MOST_BYTES = 1 << 30


class Reader:
    """A process that reads what it is told to, and is replaced when it dies."""

    def __init__(self) -> None:
        self.slowest: tuple[float, str] = (0.0, "")
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("read_damaged.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def read(self, name: str, task: dict[str, Any]) -> dict[str, Any]:
        """Return what came of a task. Fails with its name when the process hung, died or took too much memory."""
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            said = self.process.stderr.read()
            self.stop()
            self.start()
            pytest.fail(f"{name}: the process ended with {self.process.returncode}: {said[-2000:]}")
        result: dict[str, Any] = json.loads(answer)
        self.slowest = max(self.slowest, (result["seconds"], name))
        assert result["peak"] < MOST_BYTES, (name, result)
        return result

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.stop()
    print(f"the slowest: {reader.slowest[1]}, {reader.slowest[0]:.2f} s")


def check_pictures(reader: Reader, folder: Path, seeds: range) -> None:
    """Every damaged picture gives its images, or a reason."""
    for kind, whole in pictures().items():
        path = folder / "picture"
        path.write_bytes(whole)
        sound = reader.read(kind, {"path": str(path)})
        assert sound["images"] >= 1, (kind, sound)
        for seed in seeds:
            path.write_bytes(damage.damage(whole, random.Random(f"{kind} {seed}")))
            result = reader.read(f"{kind}, seed {seed}", {"path": str(path)})
            assert result["refused"] or 1 <= result["images"] <= sound["images"] + 1, (kind, seed, result)
            assert len(result.get("said", "").splitlines()) <= 1


def check_container(reader: Reader, folder: Path, name: str, seeds: range) -> None:
    """Every damaged container gives all of its pictures, or says in one line what is missing."""
    container = CONTAINERS[name]
    (folder / "sound").mkdir()
    src = container.make(folder / "sound")
    files = [path for path in (folder / "sound").rglob("*") if path.is_file()]
    whole = {path.relative_to(folder / "sound"): path.read_bytes() for path in files}
    result = build(reader, name, container, folder / "sound" / src)
    assert result["code"] == 0, result
    expected = result["images"]
    assert expected >= COUNT
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        place = folder / f"{seed}"
        shutil.copytree(folder / "sound", place)
        damaged = rng.choice(sorted(whole))
        (place / damaged).write_bytes(damage.damage(whole[damaged], rng))
        accept = seed % 2 == 1
        told = f"{name}, seed {seed}, {damaged}"
        result = build(reader, told, container, place / src, *(("--max-bad", "1") if accept else ()))
        shutil.rmtree(place)
        if result["code"]:
            assert result["code"] in (2, 65), (told, result)
            assert result["said"].count("error: ") == 1, (told, result)
            assert "Traceback" not in result["said"], (told, result)
            assert not result["left"], (told, result)
        elif container.counted:
            counted = result["images"] + result["refused"]
            assert counted == expected or (accept and result["lost"]), (told, result)


def build(reader: Reader, name: str, container: Container, src: Path, *more: str) -> dict[str, Any]:
    out = str(src.parent / "out" if src.is_file() else src.with_name(f"{src.name}-out"))
    words = [container.kind, str(src), out, "--size", "16", "--workers", "1", *more]
    return reader.read(name, {"words": words, "out": out})


def test_damaged_pictures(reader: Reader, tmp_path: Path) -> None:
    check_pictures(reader, tmp_path, range(3))


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_containers(reader: Reader, tmp_path: Path, name: str) -> None:
    check_container(reader, tmp_path, name, range(1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_pictures(reader: Reader, tmp_path: Path) -> None:
    check_pictures(reader, tmp_path, range(3, 53))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONTAINERS)
def test_many_damaged_containers(reader: Reader, tmp_path: Path, name: str) -> None:
    check_container(reader, tmp_path, name, range(1, 41))
