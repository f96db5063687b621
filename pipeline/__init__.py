"""Learning: images in, checkpoints out."""

import os

# webdataset reads this at import: no `pipe:` URLs, no unpickling of tar members (docs/architecture.md, contract 8).
os.environ.setdefault("WDS_SECURE", "1")
