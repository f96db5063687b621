"""Starting and ending the page's server."""

import os
from collections.abc import Callable
from pathlib import Path

from export.explore.session import Session
from export.samplers.base import Sampler
from pipeline.common.errors import UnavailableError


def serve(sampler: Sampler, title: str, folder: Path, *, address: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C, and `say` where it is. Files that a browser may fetch go into `folder`.

    Raises UnavailableError without Gradio, and when the port is taken.
    """
    # Read at its import: Gradio would ask its maker's host for the newest version, and report its use.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": str(folder)}
    try:
        import gradio as gr
    except ImportError as error:
        raise UnavailableError(f"the page needs Gradio ({error}): pip install 'dcgan-pipeline[explore]'") from None
    from export.explore.page import build

    fonts = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    page = build(Session(sampler), title, folder)
    try:
        _, url, _ = page.launch(
            server_name=address,
            server_port=port or None,
            allowed_paths=[str(folder)],
            theme=fonts,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UnavailableError(f"--address {address} --port {port}: {error}") from None
    say(f"the page is at {url} (Ctrl-C ends it)")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)  # else its thread keeps the process alive
