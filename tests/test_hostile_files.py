"""Whatever a file or a store holds: one line of refusal at most, and nothing outside its folder is read or written.

Every reader gets files that are right but for one mutation: a name that leads out, a number without end, brackets
without end, a cut, a flipped bit. An audit hook watches what the interpreter opens, renames, removes and connects to.
"""

import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from picture_files import make_picture
from safetensors.torch import save as save_tensors
from support import ROOT

from deploy.generation import manifest
from deploy.generation.plan import Plan
from export.builders.inspection import describe_model
from export.builders.onnx_model import float_runner, source_of, verify_onnx
from export.builders.triton import export_repository
from export.format.card import Card, Engine, Source, ports
from export.format.onnx_file import load_checked, metadata
from export.samplers.tensorrt import rebuild_command
from pipeline.checkpoints.mirror import Mirror
from pipeline.checkpoints.reference import load_generator
from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.weights import FILE_OF_KIND, METADATA_KEY, serialize
from pipeline.common.errors import DataError, UsageError, UserError
from pipeline.common.imaging import BadImage, decode, encode
from pipeline.common.onnx_graph import refuse_external_data
from pipeline.common.storage import Store, sha256_bytes
from pipeline.config import NetworkConfig, RunConfig, load_config
from pipeline.data import dataset as dataset_module
from pipeline.data.build import builder, state
from pipeline.data.build.plan import Plan as BuildPlan
from pipeline.data.build.state import BuildState, Group
from pipeline.data.dataset import DATASET_FILE, Dataset, Encoding, dump_dataset, open_dataset
from pipeline.data.dedup import dedup
from pipeline.data.dedup.semantic_hash import SemanticHash
from pipeline.data.loading.loader import Loader
from pipeline.data.shard_reader import iterate, members
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.data.show import summary
from pipeline.data.sources.cifar10 import Cifar10, load_batch
from pipeline.data.sources.label_table import read_table
from pipeline.data.sources.tars import Tars, list_dataset
from pipeline.data.verify import check_shard
from pipeline.evaluation.classifier import AttributeNet, Classifier, Head, load_classifier
from pipeline.evaluation.report.report import write_report
from pipeline.model import networks
from pipeline.model.networks import build_discriminator, build_generator
from pipeline.train import resolve
from pipeline.training.identity import describe_run
from pipeline.training.run_directory import RunDirectory

NETWORK = NetworkConfig(image_size=32, width=4, latent_dim=3)
CANARY = "canary"
OUTSIDE = (f"../{CANARY}", f"../../{CANARY}", f"a/../../{CANARY}", "/etc/passwd", f"file:///tmp/{CANARY}", "..", "/")
STRINGS = (*OUTSIDE, "", ".", "a\0b", "a\\b", "x" * 5000, "\x1b[31mred", "one\ntwo", "ünï\u202e", "[/bold]", "pipe:id")
NUMBERS = (-1, 0, 1, 7, 2**31, 2**53, 2**63, 2**70, 10**400, -(2**70), 0.5, 1e308, True)
RAW = {
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@deep object": '{"a":' * 500 + "1" + "}" * 500,
    "@nan": "NaN",
    "@infinite": "-Infinity",
    "@digits": "9" * 5000,
    "@exponent": "1e999",
    "@half": '"\\ud800"',
    "@twice": '{"a": 1, "a": 2}',
}
"""What json.dumps would not write, under the string that stands for it."""
VALUES: tuple[Any, ...] = (*STRINGS, *NUMBERS, *RAW, None, [], {}, [[]], ["../x"], {"a": 1}, [1, "a"])


@dataclass(frozen=True)
class Reader:
    """Something that reads files: what they are when they are right, and how they are read."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    examples: int = 15


class Watch:
    """Notes every path outside `root` that the interpreter touches, and every connection, while it has a root."""

    OURS = (*filter(None, sys.path), sys.prefix, sys.base_prefix, str(ROOT))
    QUIET = (*map(os.path.realpath, OURS), "/usr", "/lib", "/proc", "/sys", "/dev")
    ONE_PATH = "open os.remove os.mkdir os.rmdir os.truncate os.chmod os.utime os.listdir os.scandir shutil.rmtree"
    PATHS: ClassVar = dict.fromkeys(ONE_PATH.split(), 1) | {"os.rename": 2, "os.link": 2, "os.symlink": 2}
    NEVER = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")

    def __init__(self) -> None:
        self.root = ""
        self.noted: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root:
            return
        if event in self.NEVER:
            self.noted.append(f"{event} {arguments}")
        for path in arguments[: self.PATHS.get(event, 0)]:
            if not isinstance(path, str | bytes | os.PathLike) or not os.path.isabs(path):
                continue  # a descriptor, or a name below one, as rmtree uses them; the tests' own folder is absolute
            real = os.path.realpath(os.fsdecode(path))
            if real != self.root and not real.startswith(f"{self.root}/"):
                reads = event in ("os.listdir", "os.scandir") or (
                    event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
                )
                if not (real.startswith(self.QUIET) and (reads or "__pycache__" in real)):
                    self.noted.append(f"{event} {real}")

    @contextmanager
    def only(self, root: Path) -> Iterator[None]:
        """Fail when something outside `root` is touched meanwhile."""
        self.noted, self.root = [], os.path.realpath(root)
        try:
            yield
        finally:
            self.root = ""
        assert self.noted == []


WATCH = Watch()


# The files, as their writers make them.


def make_dataset(folder: Path, encoding: Encoding) -> None:
    store, writer = Store(folder), ShardWriter("000000", encoding, ["male", "yaw"])
    for index in range(4):
        picture = make_picture(index, 8, 8)
        writer.add(picture if encoding == "packed" else encode(picture, encoding), f"{index}.png", [True, index / 2])
    shard = write_shard(store, "000000.tar", writer)
    dataset = Dataset(
        image_size=8,
        channels=3,
        encoding=encoding,
        labels={"male": "bool", "yaw": "float"},
        source={"kind": "folder", "seed": 0, "quality": 90},
        images=4,
        bytes=shard.bytes,
        shards=[shard],
    )
    store.write(DATASET_FILE, dump_dataset(dataset))


def make_table(folder: Path) -> None:
    """Write a data set as if it had many shards, which then lie in a file beside dataset.json."""
    make_dataset(folder, "packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "LISTED_MEMBERS", 0)
        dataset_module.write_dataset(open_dataset(folder))


def read_dataset(folder: Path) -> None:
    dataset = open_dataset(folder)
    for shard in dataset.shards:
        list(map(str, check_shard(dataset, shard)))
    for _, columns in iterate(dataset, labels=True):
        for name, kind in dataset.labels.items():
            summary(columns[name], kind)
    list_dataset(dataset)
    dedup._recipe(dataset)
    dedup._recorded(dataset, "seed", 0, 1 << 64)


def read_loader(folder: Path) -> None:
    for limit in (0, 1 << 20):
        with Loader(open_dataset(folder), seed=0, streams=2, batch=2, resident_limit=limit) as loader:
            loader.next_batch()


def make_part(folder: Path) -> None:
    make_dataset(folder / "part", "png")
    dataset = open_dataset(folder / "part")
    (folder / "part" / DATASET_FILE).unlink()
    source = {"kind": "folder", "size": 8, "channels": 3, "encoding": "png"}
    plan = BuildPlan(source=source, labels=dataset.labels, listing="0" * 64, pictures=4, groups=1, shard_bytes=1 << 20)
    begun = BuildState(plan=plan, location="pictures", refused=[("a", "b")], lost={}, damaged=False)
    group = Group(shards=dataset.shards, refused=[], skipped=[("c", "d")])
    store = Store(folder / "part")
    store.write(".build/plan.json", begun.model_dump_json().encode())
    store.write(".build/000000.json", group.model_dump_json().encode())


def read_part(folder: Path) -> None:
    builder.merge(str(folder / "out"), [str(folder / "part")], max_bad=1.0)
    read_dataset(folder / "out")


def make_generation(folder: Path, merged: bool) -> None:
    plan = Plan(
        model_sha256="0" * 64,
        backend="eager",
        block_images=2,
        seed=0,
        start=0,
        count=4,
        latent_dim=3,
        latent_distribution="normal",
        image_size=8,
        channels=3,
        format="packed",
        quality=None,
        shard_images=2,
    )
    store = Store(folder)
    manifest.begin(store, plan)
    for shard in plan.shards():
        writer = ShardWriter(shard.prefix, "packed", [])
        writer.add_all(np.stack([make_picture(i, 8, 8) for i in range(2)]), ["a", "b"])
        manifest.finish_shard(store, plan, shard, writer, manifest.Provenance(device="", provider="", versions={}))
    if merged:
        manifest.merge(store)


def read_generation(folder: Path) -> None:
    store = Store(folder)
    if plan := manifest.read_plan(store):
        manifest.missing(store, plan)
    manifest.merge(store, verify=True, tidy=True)
    open_dataset(folder)


def make_run(folder: Path) -> None:
    generator, discriminator = build_generator(NETWORK), build_discriminator(NETWORK)
    files = {
        FILE_OF_KIND["ema"]: serialize(generator, NETWORK, "ema", 64),
        FILE_OF_KIND["discriminator"]: serialize(discriminator, NETWORK, "discriminator", 64),
        "metrics.jsonl": b'{"images": 64, "swd": 2.5}\n',
    }
    description = {"config": RunConfig().model_dump(), "dataset": {"fingerprint": "0" * 64, "images": 4}}
    CheckpointStore(Store(folder / "run")).save(64, files, {**description, "metrics": {"swd": 2.5}})


def read_checkpoint(folder: Path) -> None:
    store = CheckpointStore(Store(folder / "run"))
    store.best()
    load_generator(str(folder / "run"))
    mirrored = CheckpointStore(Store(folder / "here"))
    Mirror(str(folder / "run"), mirrored, 1).restore()
    mirrored.retain(1)


def make_report(folder: Path) -> None:
    run = folder / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "samples").mkdir()
    dataset = {"location": "faces", "fingerprint": "0" * 64, "images": 5, "encoding": "webp", "source": {"seed": 1}}
    config = RunConfig(network=NETWORK).model_dump()
    (run / "config.json").write_text(json.dumps({"config": config, "dataset": dataset, "starts": 1}))
    (run / ".data").write_text(str(folder / "data") + "\n")
    lines = [{"images": n, "loss_d": 1.0, "swd": 2.0, "swd_32": 1.0, "ms_ssim": 0.2} for n in (64, 128)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "timing.jsonl").write_text(json.dumps({"images": 64, "images_per_second": 5.0}) + "\n")
    (run / "samples" / "000000000064.png").write_bytes(encode(make_picture(0, 8, 8), "png"))
    (run / "evaluation" / "turn.png").write_bytes(encode(make_picture(1, 8, 8), "png"))
    shared = {"settings": {"seed": 0}, "summary": "It turns.", "note": "", "table": [["a", "b"], [1, 2.5]]}
    published = [{"what": "DCGAN", "source": "paper", "values": {"swd": 3.0}}]
    for name, picture in (("turn", [{"file": "turn.png", "caption": "A turn"}]), ("swd", [])):
        result = {"command": name, "results": {"swd": 2.0}, "pictures": picture, "published": published, **shared}
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(result))
    bench = {"title": "Speed", "hardware": {"cpu": "x"}, "rows": [{"batch": 1, "rate": 2.5}]}
    (folder / "bench.json").write_text(json.dumps(bench))


def read_report(folder: Path) -> None:
    resolve(folder / "run", None, None, None, [])
    write_report(folder / "run", folder / "page.html", bench=[folder / "bench.json"])


def make_graph() -> onnx.ModelProto:
    """Return a graph with the ports of NETWORK that has no weights but one."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [1, 32, 32, 3])
    nodes = [
        helper.make_node("ReduceMax", ["z", "axis"], ["largest"], keepdims=1),
        helper.make_node("Reshape", ["largest", "corner"], ["point"]),
        helper.make_node("Expand", ["point", "shape"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["image"], to=TensorProto.UINT8),
    ]
    constants = [
        shape,
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("corner", TensorProto.INT64, [4], [-1, 1, 1, 1]),
    ]
    inputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", NETWORK.latent_dim])]
    outputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 32, 32, 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_models(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model, source = make_graph(), Source(reference="run/x.safetensors", sha256="1" * 64, kind="ema", images_seen=64)
    for key, value in metadata(NETWORK, source, "fp32", 16).items():
        model.metadata_props.add(key=key, value=value)
    data = model.SerializeToString()
    z, image = ports(NETWORK, "uint8")
    card = Card(
        file="model.onnx",
        sha256=sha256_bytes(data),
        bytes=len(data),
        precision="fp32",
        max_batch=16,
        input=z,
        output=image,
        network=NETWORK,
        source=source,
        versions={"torch": "2.9"},
    )
    (folder / "model.onnx").write_bytes(data)
    (folder / "model.json").write_text(card.model_dump_json())
    engine = Engine(
        runtime="tensorrt",
        version="10",
        gpu="H200",
        compute_capability="9.0",
        driver="13.0",
        system="Linux",
        profiles=[[1, 1, 1], [1, 16, 16]],
        optimization_level=3,
        onnx="model.onnx",
        onnx_sha256=card.sha256,
    )
    plan = b"engine"
    changed = {"file": "engine.plan", "sha256": sha256_bytes(plan), "bytes": len(plan), "engine": engine}
    (folder / "engine.plan").write_bytes(plan)
    (folder / "engine.json").write_text(card.model_copy(update=changed).model_dump_json())


def read_models(folder: Path) -> None:
    from export.builders.engine import _onnx_card

    for name in ("model.onnx", "engine.plan"):
        model = str(folder / name)
        describe_model(model)
        export_repository(model, folder / "repository", name=name.partition(".")[0])
    card, _ = load_checked(str(folder / "model.onnx"))
    with pytest.raises(DataError, match="--ckpt"):
        verify_onnx(str(folder / "model.onnx"))
    engine = Card.model_validate_json((folder / "engine.json").read_bytes())
    rebuild_command(str(folder / "engine.plan"), engine)
    _onnx_card(str(folder / "engine.plan"), engine)
    with pytest.raises(DataError, match="no float images"):
        float_runner(card, (folder / "model.onnx").read_bytes(), "model.onnx", 1)


def make_classifier(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    head = Head("male", "bool", 0.5, 0.5)
    Classifier(AttributeNet(3, 32, 1), [head], (32, 32, 3), "0" * 64).save(folder / "classifier.safetensors")
    weights = {f"main.{i}.weight": torch.zeros(s) for i, s in ((0, (3, 8, 4, 4)), (3, (8, 4, 4, 4)))}
    torch.save(weights, folder / "netG.pth")


def read_weights(folder: Path) -> None:
    load_classifier(str(folder / "classifier.safetensors"))
    with pytest.raises(DataError):
        load_generator(str(folder / "netG.pth"))


def make_foreign(folder: Path) -> None:
    """Files that other programs write: tars, a label table, CIFAR's pickles, a configuration."""
    folder.mkdir(exist_ok=True)
    block = io.BytesIO()
    np.save(block, np.zeros((2, 8, 8, 3), np.uint8))
    members = {
        "a.png": encode(make_picture(0, 8, 8), "png"),
        "a.json": b'{"male": true, "n": 1, "list": [1]}',
        "b.npy": block.getvalue(),
        "b.cls": b"1",
    }
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    (folder / "labels.csv").write_text("file,male,n\na.png,1,5\nb.png,0,-6.5\n")
    batch = {"data": np.zeros((1, 3072), np.uint8), "labels": [0]}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}))
    (folder / "config.yaml").write_text("recipe:\n  batch: 64\nnetwork:\n  width: 8\n")


def read_foreign(folder: Path) -> None:
    tars = Tars(str(folder))
    for item in tars.listing().items:
        tars.read(item)
    read_table(str(folder / "labels.csv")).find("a.png")
    load_batch.cache_clear()
    Cifar10(str(folder), "all").listing()
    load_config(file=folder / "config.yaml")


def make_kept(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "hash-of.txt").write_text("identity")
    np.save(folder / "codes.npy", np.zeros((4, 16), np.uint8))
    SemanticHash().save(folder / "hash.safetensors")


def read_kept(folder: Path) -> None:
    marker, weights, codes = (folder / name for name in ("hash-of.txt", "hash.safetensors", "codes.npy"))
    dedup._kept_codes(marker, weights, codes, "identity", 4)


READERS = {
    "packed": Reader(lambda folder: make_dataset(folder, "packed"), read_dataset, 20),
    "table": Reader(make_table, read_dataset),
    "jpg": Reader(lambda folder: make_dataset(folder, "jpg"), read_dataset),
    "loader": Reader(lambda folder: make_dataset(folder, "packed"), read_loader),
    "part": Reader(make_part, read_part),
    "records": Reader(lambda folder: make_generation(folder, False), read_generation),
    "manifest": Reader(lambda folder: make_generation(folder, True), read_generation),
    "checkpoint": Reader(make_run, read_checkpoint, 20),
    "report": Reader(make_report, read_report, 20),
    "models": Reader(make_models, read_models, 20),
    "weights": Reader(make_classifier, read_weights),
    "foreign": Reader(make_foreign, read_foreign, 30),
    "kept": Reader(make_kept, read_kept, 8),
}


# The mutations.


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON document."""
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*above, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return the document with another value at `path`."""
    if not path:
        return value
    copy: Any = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def as_text(document: Any) -> bytes:
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode("utf-8", "surrogatepass")


def mutate(draw: Callable[..., Any], data: bytes) -> bytes:
    """Return a file's content with one thing wrong."""
    kind = draw(st.sampled_from(("value", "value", "value", "key", "extra", "cut", "byte", "insert")))
    if kind in ("value", "key", "extra"):
        try:
            document = json.loads(data)
        except ValueError:
            kind = "byte"
    if kind == "value":
        path = draw(st.sampled_from(list(places(document))))
        return as_text(replaced(document, path, draw(st.sampled_from(VALUES))))
    if kind in ("key", "extra"):
        nodes = [path for path in places(document) if isinstance(found(document, path), dict)]
        path = draw(st.sampled_from(nodes or [()]))
        node = found(document, path)
        changed = dict(node) if isinstance(node, dict) else {}
        if kind == "key" and changed:
            changed.pop(draw(st.sampled_from(list(changed))))
        changed[draw(st.sampled_from(STRINGS))] = draw(st.sampled_from(VALUES))
        return as_text(replaced(document, path, changed))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "cut":
        return data[:at]
    inserted: bytes = draw(st.sampled_from((b"\xff\xfe", b"\0", b"[" * 500, b'"', b"../" * 50)))
    if kind == "insert":
        return data[:at] + inserted + data[at:]
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


def found(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def reseal(folder: Path, old: bytes, new: bytes) -> None:
    """Put the new SHA-256 and size of a changed file into all JSON files: a hostile sender does that, too."""
    for path in folder.rglob("*.json"):
        text = path.read_bytes().replace(sha256_bytes(old).encode(), sha256_bytes(new).encode())
        path.write_bytes(re.sub(rb'("bytes": ?)%d\b' % len(old), rb"\g<1>%d" % len(new), text))


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    for name, reader in READERS.items():
        reader.make(folder / name)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_right_files_are_read(templates: Path, tmp_path: Path, name: str) -> None:
    """Else the mutations would test nothing."""
    shutil.copytree(templates / name, tmp_path / "root")
    with WATCH.only(tmp_path / "root"):
        READERS[name].read(tmp_path / "root")


@pytest.mark.parametrize("times", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", READERS)
def test_a_hostile_file_is_refused_in_one_line_and_reaches_nothing_else(
    templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    reader = READERS[name]
    (tmp_path / CANARY).write_text("unread and unchanged")
    root, here = tmp_path / "root", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a third of the time

    @settings(
        max_examples=times * reader.examples,
        derandomize=times == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(templates / name, root)
        path = data.draw(st.sampled_from(sorted(file for file in root.rglob("*") if file.is_file())))
        before = path.read_bytes()
        path.write_bytes(mutate(data.draw, before))
        if data.draw(st.booleans()):
            reseal(root, before, path.read_bytes())
        refusal = None
        with WATCH.only(root):
            try:
                reader.read(root)
            except UserError as error:
                refusal = str(error)
        assert refusal is None or refusal.isprintable(), refusal
        assert sorted(file.name for file in tmp_path.iterdir()) == [CANARY, "here", "root"]
        assert list(here.iterdir()) == []
        assert (tmp_path / CANARY).read_text() == "unread and unchanged"

    check()


# Single cases that the mutations above do not make.


def test_a_shard_is_not_read_through_a_link_that_leads_out(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", "packed")
    (tmp_path / "set" / "000000.tar").rename(tmp_path / "elsewhere.tar")
    (tmp_path / "set" / "000000.tar").symlink_to(tmp_path / "elsewhere.tar")
    dataset = open_dataset(tmp_path / "set")
    with WATCH.only(tmp_path / "set"):
        with pytest.raises(DataError, match="a link that leads out"):
            next(iterate(dataset))
        with (
            Loader(dataset, seed=0, streams=2, batch=2) as loader,
            pytest.raises(DataError, match="a link that leads out"),
        ):
            loader.next_batch()
        damage = next(iter(check_shard(dataset, dataset.shards[0])))
        assert "a link that leads out" in damage.what


def test_an_old_data_set_is_not_cleared_through_a_link_that_leads_out(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    make_part(tmp_path)
    (tmp_path / "part" / ".build").rename(home)
    out.mkdir()
    (out / ".build").symlink_to(home)
    kept = sorted(path.name for path in home.iterdir())
    with pytest.raises(DataError, match="a link that leads out"):
        state.clear(str(out))
    assert sorted(path.name for path in home.iterdir()) == kept


@pytest.mark.parametrize("name", [".lock", "log.txt", "metrics.jsonl", "samples", ".data"])
def test_a_run_does_not_write_through_a_link_that_leads_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / ".bashrc")
    (tmp_path / ".bashrc").write_text("mine")
    with pytest.raises(DataError, match="a link that leads out"):
        RunDirectory(tmp_path / "run", "data")
    assert (tmp_path / ".bashrc").read_text() == "mine"


def test_numbers_without_end_allocate_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path, "packed")
    content = json.loads((tmp_path / DATASET_FILE).read_text())
    terabytes = 1 << 44
    shard = content["shards"][0]
    shard |= {"bytes": terabytes, "images": terabytes // 192, "sizes": [terabytes - 4096], "offsets": [4096]}
    shard["images"] = shard["sizes"][0] // 192
    shard["sizes"] = [shard["images"] * 192]
    content |= {"bytes": shard["bytes"], "images": shard["images"]}
    (tmp_path / DATASET_FILE).write_text(json.dumps(content))
    dataset = open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"bytes"), Loader(dataset, seed=0, streams=1, batch=1) as loader:
        loader.next_batch()


def test_a_plan_of_more_shards_than_memory_holds_is_counted_not_listed(tmp_path: Path) -> None:
    make_generation(tmp_path, False)
    path = tmp_path / manifest.PLAN
    path.write_text(json.dumps({**json.loads(path.read_text()), "count": 1 << 47, "shard_images": 1}))
    with pytest.raises(UserError, match=f"{(1 << 47) - 2} of {1 << 47} shards are missing, the first with images 1"):
        manifest.merge(Store(tmp_path))


def test_a_tar_whose_member_goes_backwards_ends(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    for size in (b"-0000001000\0", b"\xff" * 12):
        header[124:136] = size
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(DataError):
            list(members(bytes(header) + bytes(1024), "a.tar"))
        (tmp_path / "0.tar").write_bytes(bytes(header) + bytes(2048))
        with suppress(DataError), WATCH.only(tmp_path):
            Tars(str(tmp_path)).listing()


@pytest.mark.parametrize("shape", [(10**15, 1 << 32, 1 << 32, 3), (10**15, 0, 8, 3)])
def test_an_array_that_says_it_is_endless_is_no_block_of_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    block = io.BytesIO()
    np.lib.format.write_array_header_1_0(block, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in {"a.npy": block.getvalue(), "b.png": encode(make_picture(0, 8, 8), "png")}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    listing = Tars(str(tmp_path)).listing()
    assert [item.key for item in listing.items] == ["0.tar/b.png"]
    assert listing.refused.entries == [("0.tar/a.npy", "not a block of uint8 images")]


def test_a_jpeg_that_says_it_is_huge_is_refused_before_it_is_decoded() -> None:
    data = bytearray(encode(make_picture(0, 8, 8), "jpg"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc" * 2
    with pytest.raises(BadImage, match="too many pixels"):
        decode(bytes(data))


def test_a_small_file_does_not_build_a_large_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = NETWORK.model_copy(update={"width": 1024, "image_size": 128})
    data = save_tensors(
        {"layers.0.weight": torch.zeros(1)},
        {METADATA_KEY: json.dumps({"network": wide.model_dump(), "kind": "ema", "images_seen": 1})},
    )
    (tmp_path / "x.safetensors").write_bytes(data)
    made, build = [], networks.build_generator

    def note(config: NetworkConfig) -> networks.Generator:
        made.append(torch.get_default_device().type)
        return build(config)

    monkeypatch.setattr(networks, "build_generator", note)
    with pytest.raises(DataError, match="do not fit the network they name"):
        load_generator(str(tmp_path / "x.safetensors"))
    assert made == ["meta"]


def test_a_model_whose_weights_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    make_models(tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    tensor = model.graph.initializer[1]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("int64_data")
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    branch = helper.make_graph([], "branch", [], [], [tensor])
    inner = make_graph()
    inner.graph.node[0].attribute.add(name="inner", type=onnx.AttributeProto.GRAPH, g=branch)
    for hostile in (model, inner):
        with pytest.raises(DataError, match="its weights lie in another file"):
            refuse_external_data(hostile, "model.onnx")
    data = model.SerializeToString()
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.onnx").write_bytes(data)
    (tmp_path / "model.json").write_text(json.dumps({**card, "sha256": sha256_bytes(data), "bytes": len(data)}))
    with pytest.raises(DataError, match="its weights lie in another file"):
        load_checked(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize(
    "edit",
    [
        {"source": {"reference": "x", "sha256": f"{'0' * 64}\nversion_policy: {{}}", "kind": "ema"}},
        {"input": {"name": 'z" } ] parameters { key: "', "dtype": "float32", "shape": ["batch", 3], "values": "U"}},
    ],
    ids=["source", "input"],
)
def test_a_card_adds_nothing_to_tritons_configuration(tmp_path: Path, edit: dict[str, Any]) -> None:
    make_models(tmp_path)
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(DataError):
        export_repository(str(tmp_path / "engine.plan"), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_what_a_card_names_is_not_opened(tmp_path: Path) -> None:
    """A card is data. It could make us fetch a URL, or read a file of ours."""
    make_models(tmp_path)
    make_run(tmp_path)
    path = tmp_path / "model.json"
    card = json.loads(path.read_text())
    weights = tmp_path / "run" / "checkpoints" / f"{64:012d}" / FILE_OF_KIND["ema"]
    for reference in ("http://127.0.0.1:9/x.pth", str(weights)):
        card["source"]["reference"] = reference
        path.write_text(json.dumps(card))
        with WATCH.only(tmp_path), pytest.raises(DataError, match="name them with --ckpt"):
            verify_onnx(str(tmp_path / "model.onnx"))


def test_cards_and_runs_do_not_say_where_they_were_made(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_dataset(tmp_path / "data", "packed")
    reference = f"run/checkpoints/{64:012d}/generator_ema.safetensors"
    loaded = load_generator(str(tmp_path / "run"))
    assert (loaded.source, loaded.reference) == (str(tmp_path / reference), reference)
    shutil.copy(loaded.source, tmp_path / "mine.safetensors")
    assert load_generator(str(tmp_path / "mine.safetensors")).reference == "mine.safetensors"
    assert source_of(loaded).reference == reference
    dataset = open_dataset(tmp_path / "data")
    dataset = dataset.model_copy(update={"source": {**dataset.source, "location": str(tmp_path / "pictures")}})
    description = describe_run(RunConfig(), dataset)
    assert str(tmp_path) not in json.dumps(description)
    assert description["dataset"]["location"] == "data"


def test_a_run_knows_its_data_here_and_is_told_elsewhere(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", "packed")
    description = describe_run(RunConfig(), open_dataset(tmp_path / "data"))
    with RunDirectory(tmp_path / "run", os.path.relpath(tmp_path / "data")) as run:
        assert run.write_config(description) == 1
        assert run.write_config(description) == 2
        run.record(32, {})
    assert resolve(tmp_path / "run", None, None, None, [])[1] == str(tmp_path / "data")
    (tmp_path / "run" / ".data").unlink()  # as in a copy of what is published
    assert resolve(tmp_path / "run", None, None, None, [])[1] is None
    assert resolve(tmp_path / "run", "there", None, None, [])[1] == "there"
    config = tmp_path / "run" / "config.json"
    old = {**description, "dataset": {**description["dataset"], "location": "/data/faces"}}
    config.write_text(json.dumps(old))  # as 0.1.0 wrote it
    assert resolve(tmp_path / "run", None, None, None, [])[1] == "/data/faces"


def test_a_run_of_others_does_not_choose_the_program_that_evaluates_it(tmp_path: Path) -> None:
    make_report(tmp_path)
    config = tmp_path / "run" / "config.json"
    content = json.loads(config.read_text())
    content["config"]["schedule"]["extractor"] = "run/evil.pt"
    config.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"schedule\.extractor=run/evil\.pt"):
        resolve(tmp_path / "run", None, None, None, [])
    settings = resolve(tmp_path / "run", None, None, None, ["schedule.extractor=run/evil.pt"])[0]
    assert settings.schedule.extractor == "run/evil.pt"


@pytest.mark.parametrize("name", ["netG.ckpt", "netG.tar", "netG.bin"])
def test_a_file_that_holds_no_weights_is_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(DataError, match=rf"{name}: neither a safetensors nor a file of torch.save"):
        load_generator(str(tmp_path / name))


def test_the_refusal_of_a_pickle_has_no_escapes(tmp_path: Path) -> None:
    torch.save({"main.0.weight": Path("x")}, tmp_path / "netG.PTH")
    with pytest.raises(DataError) as caught:
        load_generator(str(tmp_path / "netG.PTH"))
    assert "cannot be read without running code" in str(caught.value)
    assert "x1b" not in str(caught.value)
