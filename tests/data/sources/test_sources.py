"""Every kind of source builds from its true on-disk format: pixels exact, labels right, hostile files refused."""

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np
import pytest
from picture_files import make_picture
from scipy.io import savemat
from storage_servers import NGINX, nginx, python_server

from pipeline.common.imaging import Pixels, encode
from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate


def contents(out: Path) -> dict[str, tuple[Pixels, dict[str, Any]]]:
    """Return {key: (image, labels)} of a data set."""
    return {
        columns["key"][i]: (image, {name: columns[name][i] for name in columns if name != "key"})
        for images, columns in iterate(open_dataset(out), labels=True)
        for i, image in enumerate(images)
    }


def lsun_database(path: Path, start: int, count: int) -> dict[str, Pixels]:
    """Write an lmdb as LSUN's exporter does, WebP and JPEG mixed; return {key: picture}."""
    pictures = {}
    with lmdb.open(str(path), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for index in range(start, start + count):
            key = os.urandom(20).hex()
            pictures[key] = make_picture(index, 32, 32)
            value = encode(pictures[key], "webp", 100) if index % 2 else encode(pictures[key], "jpg", 95)
            transaction.put(key.encode(), value)
    return pictures


def test_lsun_categories_and_splits(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "lsun").mkdir()
    bedrooms = lsun_database(tmp_path / "lsun" / "bedroom_train_lmdb", 0, 20)
    churches = lsun_database(tmp_path / "lsun" / "church_outdoor_train_lmdb", 100, 10)
    lsun_database(tmp_path / "lsun" / "bedroom_val_lmdb", 200, 5)
    options = ["--size", 32, "--split", "train", "--category", "bedroom", "--category", "church_outdoor"]
    done = dcgan_data("build", "lsun", tmp_path / "lsun", tmp_path / "out", *options)
    assert done.code == 0, done.err
    found = contents(tmp_path / "out")
    expected = {f"bedroom_train_lmdb/{k}": (p, "bedroom") for k, p in bedrooms.items()}
    expected |= {f"church_outdoor_train_lmdb/{k}": (p, "church_outdoor") for k, p in churches.items()}
    assert found.keys() == expected.keys()
    for key, (image, labels) in found.items():
        assert labels == {"class": expected[key][1]}
        assert np.abs(image.astype(int) - expected[key][0]).mean() < 4
    one = dcgan_data("build", "lsun", tmp_path / "lsun" / "bedroom_train_lmdb", tmp_path / "one", "--size", 32)
    assert one.code == 0
    assert open_dataset(tmp_path / "one").images == 20
    assert dcgan_data("verify", tmp_path / "one").code == 0
    wrong = dcgan_data("build", "lsun", tmp_path / "lsun", tmp_path / "x", "--category", "kitchen")
    assert wrong.code == 2
    assert "bedroom, church_outdoor" in wrong.err


def test_a_broken_lsun_database_keeps_what_can_be_read(dcgan_data: Any, tmp_path: Path) -> None:
    path = tmp_path / "bedroom_train_lmdb"
    lsun_database(path, 0, 400)
    data = bytearray((path / "data.mdb").read_bytes())
    page = 4096
    leaves = [at for at in range(2 * page, len(data), page) if struct.unpack_from("<H", data, at + 10)[0] == 2]
    struct.pack_into("<H", data, leaves[len(leaves) // 2] + 10, 0x7F00)  # page flags that no page has
    (path / "data.mdb").write_bytes(data)
    first = dcgan_data("build", "lsun", path, tmp_path / "out", "--size", 32)
    assert first.code == 65
    assert "lost in the damaged database" in first.err
    assert not (tmp_path / "out" / "dataset.json").exists()
    done = dcgan_data("build", "lsun", path, tmp_path / "out", "--size", 32, "--max-bad", 0.5)
    assert done.code == 0, done.err
    dataset = open_dataset(tmp_path / "out")
    assert 350 < dataset.images < 400
    assert dataset.images + dataset.refused.count == 400
    short = tmp_path / "short_train_lmdb"
    short.mkdir()
    (short / "data.mdb").write_bytes(data[: len(data) // 2])
    done = dcgan_data("build", "lsun", short, tmp_path / "cut", "--size", 32)
    assert done.code == 65
    assert "cut off" in done.err


def test_an_lmdb_with_keys_in_any_script_is_read(dcgan_data: Any, tmp_path: Path) -> None:
    path = tmp_path / "own_train_lmdb"
    keys = ["写真".encode(), b"\xff\xfe", b"a/b.jpg", b"plain"]
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for index, key in enumerate(keys):
            transaction.put(key, encode(make_picture(index, 32, 32), "png"))
    done = dcgan_data("build", "lsun", path, tmp_path / "out", "--size", 32)
    assert done.code == 0, done.err
    pixels = {image.tobytes() for image, _ in contents(tmp_path / "out").values()}
    assert pixels == {make_picture(index, 32, 32).tobytes() for index in range(4)}


def test_lsun_over_a_network_is_refused_by_name(dcgan_data: Any, tmp_path: Path) -> None:
    done = dcgan_data("build", "lsun", "s3://bucket/bedroom_train_lmdb", tmp_path / "out")
    assert (done.code, "lsun reads local folders only" in done.err) == (2, True), done.err


def celeba_files(root: Path, form: str) -> None:
    names = ["5_o_Clock_Shadow", "Eyeglasses", "Male", "Smiling"]
    rows = [(f"{i + 1:06d}.jpg", [1 if (i >> b) & 1 else -1 for b in range(4)], i % 3) for i in range(12)]
    images = root / ("Img" if form == "authors" else "") / "img_align_celeba"
    images = images / "img_align_celeba" if form == "csv" else images
    images.mkdir(parents=True)
    attributes, partition = (root / "Anno", root / "Eval") if form == "authors" else (root, root)
    attributes.mkdir(exist_ok=True)
    partition.mkdir(exist_ok=True)
    for index, (name, _, _) in enumerate(rows):
        (images / name).write_bytes(encode(make_picture(index, 178, 218), "jpg"))
    if form != "csv":
        lines = ["12", " ".join(names), *(f"{n}  " + " ".join(f"{v:2d}" for v in values) for n, values, _ in rows)]
        (attributes / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        (partition / "list_eval_partition.txt").write_text("".join(f"{n} {part}\n" for n, _, part in rows))
    else:
        lines = ["image_id," + ",".join(names), *(f"{n}," + ",".join(map(str, values)) for n, values, _ in rows)]
        (root / "list_attr_celeba.csv").write_text("\n".join(lines) + "\n")
        lines = ["image_id,partition", *(f"{n},{part}" for n, _, part in rows)]
        (root / "list_eval_partition.csv").write_text("\n".join(lines) + "\n")


def test_all_forms_of_celeba_give_the_same_bytes(dcgan_data: Any, tmp_path: Path) -> None:
    for form in ("txt", "csv", "authors"):
        celeba_files(tmp_path / form, form)
        done = dcgan_data("build", "celeba", tmp_path / form, tmp_path / f"out-{form}", "--size", 32)
        assert done.code == 0, done.err
    text, table, tree = (open_dataset(tmp_path / f"out-{form}") for form in ("txt", "csv", "authors"))
    assert text.fingerprint() == table.fingerprint() == tree.fingerprint()
    assert text.labels == dict.fromkeys(["5_o_clock_shadow", "eyeglasses", "male", "smiling"], "bool")
    for key, (_, labels) in contents(tmp_path / "out-txt").items():
        index = int(key[:6]) - 1
        assert list(labels.values()) == [bool((index >> bit) & 1) for bit in range(4)]
    options = ["--size", 32, "--split", "val", "--where", "male=1"]
    for form in ("txt", "authors"):
        assert dcgan_data("build", "celeba", tmp_path / form, tmp_path / f"val-{form}", *options).code == 0
        keys = set(contents(tmp_path / f"val-{form}"))
        assert keys == {f"{i + 1:06d}.jpg" for i in range(12) if i % 3 == 1 and (i >> 2) & 1}


@pytest.mark.parametrize("form", ["txt", "csv"])
@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty; expected a row"), (b"\xff\xfea\0", "not a list in UTF-8")]
)
def test_a_list_of_celeba_that_is_none_is_refused_by_name(
    dcgan_data: Any, tmp_path: Path, form: str, content: bytes, words: str
) -> None:
    celeba_files(tmp_path, form)
    (tmp_path / f"list_attr_celeba.{form}").write_bytes(content)
    done = dcgan_data("build", "celeba", tmp_path, tmp_path / "out")
    assert (done.code, f"list_attr_celeba.{form}: {words}" in done.err) == (65, True), done.err


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, whose str was both."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        write: Any = getattr(self, "write")  # noqa: B009  unknown to the type checker
        write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(content: dict[str, Any]) -> bytes:
    """Return a pickle as CIFAR's authors wrote it in 2009."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(root: Path) -> np.ndarray[Any, Any]:
    """Write the pickles of CIFAR-10 with 4 images a batch; return all pixels (24, 32, 32, 3)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = pixels[4 * number : 4 * number + 4]
        content = {
            "data": part.transpose(0, 3, 1, 2).reshape(4, 3072).copy(),
            "labels": [(4 * number + i) % 10 for i in range(4)],
            "filenames": ["x.png"] * 4,
        }
        (folder / name).write_bytes(python2_pickle(content))
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": CLASSES, "num_vis": 3072}))
    return pixels


def test_cifar10_folder_and_archive(dcgan_data: Any, tmp_path: Path) -> None:
    pixels = cifar_files(tmp_path / "cifar")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar" / "cifar-10-batches-py", "cifar-10-batches-py")
    for src in (tmp_path / "cifar", tmp_path / "cifar" / "cifar-10-batches-py", archive):
        out = tmp_path / f"out-{src.name}"
        done = dcgan_data("build", "cifar10", src, out, "--size", 32, "--split", "all")
        assert done.code == 0, done.err
        found = contents(out)
        assert len(found) == 24
        for key, (image, labels) in found.items():
            file, index = key.split("/")
            number = 4 * (5 if file == "test_batch" else int(file[-1]) - 1) + int(index)
            assert np.array_equal(image, pixels[number])
            assert labels == {"label": number % 10, "class": CLASSES[number % 10]}
    assert dcgan_data("build", "cifar10", archive, tmp_path / "train", "--size", 32).code == 0
    assert open_dataset(tmp_path / "train").images == 20


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_cifar_pickle_that_wants_to_run_something_is_refused_by_name(dcgan_data: Any, tmp_path: Path) -> None:
    cifar_files(tmp_path / "cifar")
    hostile = pickle.dumps({"data": Hostile(tmp_path / "ran"), "labels": []}, protocol=2)
    (tmp_path / "cifar" / "cifar-10-batches-py" / "data_batch_3").write_bytes(hostile)
    done = dcgan_data("build", "cifar10", tmp_path / "cifar", tmp_path / "out", "--size", 32)
    assert done.code == 65
    assert "data_batch_3: refused: it wants to import posix.mkdir" in done.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_is_read_in_blocks_and_exactly(dcgan_data: Any, tmp_path: Path, compressed: bool) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 500), dtype=np.uint8)
    digits = (np.arange(500) % 10 + 1).astype(np.uint8)[:, None]
    savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": digits}, do_compression=compressed)
    done = dcgan_data("build", "svhn", tmp_path, tmp_path / "out", "--size", 32, "--workers", 2)
    assert done.code == 0, done.err
    found = contents(tmp_path / "out")
    assert len(found) == 500
    for key, (image, labels) in found.items():
        index = int(key.rpartition("/")[2])
        assert np.array_equal(image, pixels[..., index])
        assert labels == {"label": (index % 10 + 1) % 10}
    one = ["build", "svhn", tmp_path / "train_32x32.mat", tmp_path / "one", "--size", 32]
    done = dcgan_data(*one, "--split", "extra")
    assert (done.code, "--split extra: SRC is the one file train_32x32.mat" in done.err) == (2, True)
    assert dcgan_data(*one).code == 0
    data = (tmp_path / "train_32x32.mat").read_bytes()
    (tmp_path / "train_32x32.mat").write_bytes(data[: len(data) // 2])
    done = dcgan_data("build", "svhn", tmp_path / "train_32x32.mat", tmp_path / "cut", "--size", 32)
    assert done.code == 65
    assert "not an SVHN file" in done.err


def imagenet_files(root: Path) -> tuple[str, ...]:
    """Write three classes as folders, as a tar each, and as the one tar of those; return their names."""
    classes = ("n01440764", "n01443537", "n02102040")
    (root / "tars").mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as whole:
        for number, wnid in enumerate(classes):
            (root / "folders" / wnid).mkdir(parents=True)
            with tarfile.open(root / "tars" / f"{wnid}.tar", "w") as tar:
                for index in range(4):
                    data = encode(make_picture(10 * number + index, 40, 30), "jpg")
                    name = f"{wnid}_{index}.JPEG"
                    (root / "folders" / wnid / name).write_bytes(data)
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            whole.add(root / "tars" / f"{wnid}.tar", f"{wnid}.tar")
    return classes


def test_imagenet_folders_class_tars_and_the_tar_of_tars(dcgan_data: Any, tmp_path: Path) -> None:
    classes = imagenet_files(tmp_path)
    outer = tmp_path / "ILSVRC2012_img_train.tar"
    prints = set()
    for src in (tmp_path / "folders", tmp_path / "tars", outer):
        out = tmp_path / f"out-{src.name}"
        done = dcgan_data("build", "imagenet", src, out, "--size", 16)
        assert done.code == 0, done.err
        assert open_dataset(out).images == 12
        prints.add(open_dataset(out).fingerprint())
        for key, (_, labels) in contents(out).items():
            assert labels == {"class": key.partition("/")[0], "label": classes.index(key.partition("/")[0])}
    assert len(prints) == 1


@pytest.mark.parametrize(
    "ranges",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not NGINX, reason="nginx is not installed; `make system` installs it")
        ),
    ],
)
def test_archives_are_read_over_http(dcgan_data: Any, tmp_path: Path, ranges: bool) -> None:
    """From servers that know ranges, and from those that send the whole file every time."""
    www = tmp_path / "www"
    cifar_files(www / "cifar")
    with tarfile.open(www / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(www / "cifar" / "cifar-10-batches-py", "cifar-10-batches-py")
    (www / "svhn").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 300), dtype=np.uint8)
    digits = (np.arange(300) % 10 + 1).astype(np.uint8)[:, None]
    savemat(www / "svhn" / "train_32x32.mat", {"X": pixels, "y": digits}, do_compression=True)
    imagenet_files(www)
    places = [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar10", "cifar"),
        ("svhn", "svhn"),
        ("svhn", "svhn/train_32x32.mat"),
        ("imagenet", "ILSVRC2012_img_train.tar"),
        ("imagenet", "tars"),
    ]
    with nginx(www, tmp_path / "nginx") if ranges else python_server(www) as port:
        for number, (source, place) in enumerate(places):
            far, near = tmp_path / f"far-{number}", tmp_path / f"near-{number}"
            done = dcgan_data("build", source, f"http://127.0.0.1:{port}/{place}", far, "--size", 16, "--workers", 1)
            assert done.code == 0, (place, done.err)
            assert dcgan_data("build", source, www / place, near, "--size", 16, "--workers", 1).code == 0
            assert open_dataset(far).fingerprint() == open_dataset(near).fingerprint(), place


def test_ffhq_thumbnails_and_their_split(dcgan_data: Any, tmp_path: Path) -> None:
    for number in (0, 1000, 59_999, 60_000, 69_999):
        place = tmp_path / "thumbnails128x128" / f"{number // 1000 * 1000:05d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.png").write_bytes(encode(make_picture(number, 128, 128), "png"))
    src = tmp_path / "thumbnails128x128"
    assert dcgan_data("build", "ffhq", src, tmp_path / "all", "--size", 128).code == 0
    assert open_dataset(tmp_path / "all").labels == {}
    for key, (image, _) in contents(tmp_path / "all").items():
        assert np.array_equal(image, make_picture(int(Path(key).stem), 128, 128))
    assert dcgan_data("build", "ffhq", src, tmp_path / "val", "--size", 64, "--split", "val").code == 0
    assert {Path(key).stem for key in contents(tmp_path / "val")} == {"60000", "69999"}


def test_options_that_a_source_would_ignore_are_refused(dcgan_data: Any, tmp_path: Path) -> None:
    done = dcgan_data("build", "ffhq", tmp_path, tmp_path / "out", "--labels", "x.csv")
    assert done.code == 2
    assert "--labels: has no effect on the source ffhq" in done.err
