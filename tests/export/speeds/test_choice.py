"""What `--backend auto` takes follows from a table, by processor, threads and block size. Nothing here is timed."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from export_cases import Cli, Export
from support import ROOT

from export.format.card import copy_model
from export.format.speeds import ProcessorSpeeds, SpeedTable, add_speeds, our_speeds, read_speeds, speeds_name
from export.samplers import choice
from export.samplers.choice import LIKE, choose_cpu_backend
from export.samplers.open import open_sampler
from pipeline.common import machine
from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.machine import Instructions, instructions, processor_kind

FLAGS: dict[Instructions, str] = {
    "amx": "sse2 avx2 avx512f amx_tile",
    "avx512": "sse2 avx2 avx512f",
    "avx2": "sse2 avx avx2",
    "other": "asimd",
}
Become = Callable[..., None]


@pytest.fixture
def become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Become:
    """Run on another processor: become("avx2", model=97)."""

    def become(kind: Instructions, model: int = 7) -> None:
        path = tmp_path / "cpuinfo"
        core = f"model\t\t: {model}\nmodel name\t: A Processor\nflags\t\t: fpu {FLAGS[kind]}\n"
        path.write_text("\n".join(f"processor\t: {index}\n{core}" for index in range(2)))
        monkeypatch.setattr(machine, "CPU_INFO", path)

    return become


def speeds(threads: int = 2, **rates: dict[int, float]) -> ProcessorSpeeds:
    """Return what was measured on this processor: speeds(openvino={1: 100.0})."""
    batches = sorted({batch for measured in rates.values() for batch in measured})
    return ProcessorSpeeds(
        processor=processor_kind(),
        instructions=instructions(),
        threads=threads,
        date="2026-11-28",
        versions={},
        images_per_second={
            batch: {backend: measured[batch] for backend, measured in rates.items() if batch in measured}
            for batch in batches
        },
    )


@pytest.mark.parametrize("kind", FLAGS)
def test_a_processor_is_known_by_its_flags_and_numbers(become: Become, kind: Instructions) -> None:
    become(kind, model=97)
    assert (instructions(), processor_kind()) == (kind, "A Processor, model 97")


def test_the_fastest_at_the_nearest_block_size_is_taken(copy: Path, exported: Export) -> None:
    openvino, onnxruntime = {1: 50.0, 8: 98.1, 64: 97.9}, {1: 100.0, 8: 100.0, 64: 100.0}
    add_speeds(str(copy), speeds(openvino=openvino, onnxruntime=onnxruntime))
    taken = {
        batch: choose_cpu_backend(str(copy), exported.card, batch, 2).backend for batch in (1, 2, 3, 8, 22, 23, 4096)
    }
    slow = ["onnxruntime", "onnxruntime", "openvino", "openvino", "openvino", "onnxruntime", "onnxruntime"]
    assert list(taken.values()) == slow, "of two that are equally fast, always the same"
    with open_sampler(str(copy), batch=2, threads=2) as sampler:
        assert sampler.backend == "onnxruntime"
        assert sampler.chosen_because == f"the fastest here at blocks of 2, by {speeds_name(str(copy))}"
    with open_sampler(str(copy), batch=8, threads=2) as sampler:
        assert sampler.backend == "openvino"


def test_another_processor_or_number_of_threads_is_not_this_one(
    copy: Path, exported: Export, become: Become, monkeypatch: pytest.MonkeyPatch
) -> None:
    become("avx512")
    ours = SpeedTable(network=exported.card.network, precision="fp32", processors=[speeds(openvino={8: 1.0})])
    monkeypatch.setattr(choice, "our_speeds", lambda: ours)
    add_speeds(str(copy), speeds(onnxruntime={8: 1.0}))
    assert choose_cpu_backend(str(copy), exported.card, 8, 2).backend == "onnxruntime"
    assert choose_cpu_backend(str(copy), exported.card, 8, 3).backend == "openvino"
    become("avx512", model=8)
    assert choose_cpu_backend(str(copy), exported.card, 8, 2).backend == "openvino"


def test_where_nothing_was_measured_the_nearest_kind_counts_and_that_is_said(
    exported: Export, become: Become, monkeypatch: pytest.MonkeyPatch
) -> None:
    become("avx2")
    ours = SpeedTable(network=exported.card.network, precision="fp32", processors=[speeds(onnxruntime={8: 1.0})])
    monkeypatch.setattr(choice, "our_speeds", lambda: ours)
    found = {}
    for kind in LIKE:
        become(kind)
        found[kind] = choose_cpu_backend(str(exported.model), exported.card, 8, 2)
    assert {kind: one.backend for kind, one in found.items()} == {
        "amx": "onnxruntime",
        "avx512": "onnxruntime",
        "avx2": "onnxruntime",
        "other": "openvino",
    }
    assert found["avx2"].reason == "the fastest at blocks of 8 on a processor with avx2"
    assert found["amx"].reason.endswith("with avx2; none with amx was measured")
    assert found["other"].reason.startswith("not measured on a processor like this one")


def test_only_what_is_installed_is_taken(copy: Path, exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    add_speeds(str(copy), speeds(openvino={8: 1.0}, onnxruntime={8: 100.0}))
    real = importlib.util.find_spec
    missing = {"onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    assert choose_cpu_backend(str(copy), exported.card, 8, 2).backend == "openvino"
    missing.add("openvino")
    with pytest.raises(UnavailableError, match="pip install openvino onnxruntime"):
        choose_cpu_backend(str(copy), exported.card, 8, 2)


def test_a_table_of_another_network_or_a_damaged_one_is_refused(copy: Path, exported: Export) -> None:
    table = SpeedTable(
        network=exported.card.network.model_copy(update={"width": 64}),
        precision="fp32",
        processors=[speeds(openvino={8: 1.0})],
    )
    path = Path(speeds_name(str(copy)))
    for content, words in (
        (table.model_dump_json(), "another network"),
        ("{", "not JSON"),
        ('{"version": 9}', "version 9"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"model\.speed\.json: .*{words}.*delete it.*bench --calibrate --model"):
            open_sampler(str(copy), batch=8)
        with open_sampler(str(copy), backend="onnxruntime", batch=8):
            pass  # who names a backend needs no table
        add_speeds(str(copy), speeds(onnxruntime={8: 1.0}))  # and to measure again replaces it
        assert choose_cpu_backend(str(copy), exported.card, 8, 2).backend == "onnxruntime"


def test_calibrating_writes_what_it_measured_and_auto_follows(cli: Cli, copy: Path, exported: Export) -> None:
    other = speeds(threads=7, openvino={8: 1.0})
    add_speeds(str(copy), other)
    options = ("bench", "--calibrate", "--model", copy, "--out", copy.parent / "bench", "--quick", "--rounds", 3)
    code, output, error = cli(*options, "--batch", 4, "--batch", 1, "--batch", 64, "--threads", 1)
    assert code == 0, error
    table = read_speeds(str(copy))
    assert table is not None
    assert table.processors[0] == other
    (mine,) = table.processors[1:]
    assert (mine.processor, mine.threads, sorted(mine.images_per_second)) == (processor_kind(), 1, [1, 4])
    rows = json.loads((copy.parent / "bench" / "bench.json").read_text())["rows"]
    assert {(row["batch"], row["backend"]): row["images_per_second"] for row in rows} == {
        (batch, backend): rate for batch, rates in mine.images_per_second.items() for backend, rate in rates.items()
    }
    assert set(mine.versions) == {"openvino", "onnxruntime"}
    for batch in (1, 4):
        with open_sampler(str(copy), batch=batch, threads=1) as sampler:
            assert f"{batch}: {sampler.backend}" in output
            assert "model.speed.json" in sampler.chosen_because


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give one --model"),
        (("--model", "a.onnx", "--model", "b.onnx"), "give one --model"),
        (("--model", "a.onnx", "--ckpt", "run"), "no --ckpt"),
        (("--model", "a.onnx", "--backend", "openvino"), "no --backend"),
        (("--model", "a.plan"), "expected a .onnx"),
        (("--model", "{copy}", "--batch", 17), "takes at most 16 images"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(cli: Cli, copy: Path, options: tuple[object, ...], words: str) -> None:
    arguments = [copy if option == "{copy}" else option for option in options]
    code, _, error = cli("bench", "--calibrate", "--out", copy.parent / "bench", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert words in error
    assert not (copy.parent / "bench").exists()


def test_a_published_model_takes_its_table_along(cli: Cli, copy: Path) -> None:
    add_speeds(str(copy), speeds(onnxruntime={8: 1.0}))
    code, _, error = cli("publish", "--model", copy, "--to", copy.parent / "bucket")
    assert code == 0, error
    assert read_speeds(str(copy.parent / "bucket" / copy.name)) == read_speeds(str(copy))
    copy_model(str(copy), str(copy.parent / "without"))
    assert read_speeds(str(copy.parent / "without" / copy.name)) is None


def test_our_table_is_what_the_benchmark_measured() -> None:
    results = {path.stem.rpartition("_")[2]: path for path in (ROOT / "benchmarks" / "results").glob("sampling_*.json")}
    table: dict[str, ProcessorSpeeds] = {row.instructions: row for row in our_speeds().processors}
    assert set(table) == set(results) >= {"avx2", "avx512"}
    for kind, path in results.items():
        content = json.loads(path.read_text())
        rates: dict[int, dict[str, float]] = {}
        for row in content["rows"]:
            if row["backend"] in choice.CPU_BACKENDS:
                rates.setdefault(row["batch"], {})[row["backend"]] = row["images_per_second"]
        assert table[kind].images_per_second == rates
        assert table[kind].threads == content["threads"]
