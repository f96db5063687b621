"""Learning: images in, checkpoints out."""

import os

# webdataset reads this at import: no `pipe:` URLs, no unpickling of tar members (docs/architecture.md, contract 8).
os.environ.setdefault("WDS_SECURE", "1")
# ONNX Runtime reads this at import: without it, it keeps an identifier in the home folder and reports its use.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
