"""The page itself, in Gradio. Import it through `serve`, which sees to it that Gradio asks no host for anything."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from export.explore.session import COLUMNS, ROWS, Session, Shown
from pipeline.common.errors import UserError
from pipeline.config import NetworkConfig, class_titles
from pipeline.evaluation.paper.walks import Z

SLOTS = {"walk from": 1, "walk to": 1, "A": 3, "B": 3, "C": 3}
"""What a click on a sample can fill, and how many samples each takes: the paper averages three for a sum."""
STEPS = 24
SUM = "A − B + C"

Picks = dict[str, list[tuple[str, Z]]]
"""For each slot, the names and z of the samples in it."""


def name_of(label: str | None, seed: int, index: int, truncation: float) -> str:
    """Return what tells a sample from every other of this model."""
    factor = "" if truncation == 1 else f" × {truncation:g}"
    return f"{seed}:{index}{factor}" + (f" ({label})" if label else "")


def picked(picks: Picks, slot: str, name: str, z: Z) -> Picks:
    """Return `picks` with a sample more in `slot`; the oldest leaves a full one."""
    return picks | {slot: [*picks[slot], (name, z)][-SLOTS[slot] :]}


def in_words(picks: Picks) -> str:
    """Return what is in each slot, as Markdown."""
    return "&emsp;".join(f"**{slot}**: {', '.join(name for name, _ in picks[slot]) or '–'}" for slot in SLOTS)


class Handlers:
    """What the page does when something on it is used. Files that a browser may fetch go into `folder`."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder

    def draw(self, seed: float, start: float, truncation: float, label: str | None) -> tuple[Any, ...]:
        """Show the samples that a seed has from `start` on."""
        shown, files = self._made(lambda: self.session.grid(int(seed), int(start), truncation, label or None))
        names = [name_of(shown.label, int(seed), int(start) + row, truncation) for row in range(len(shown.z))]
        images = [image[..., 0] if image.shape[-1] == 1 else image for image in shown.images]
        return (shown, names), gr.Gallery(list(zip(images, names, strict=True)), selected_index=None), files

    def turn(self, by: int, seed: float, start: float, truncation: float, label: str | None) -> tuple[Any, ...]:
        """Show other samples of the same seed, `by` further on."""
        start = max(0, int(start) + by)
        return start, *self.draw(seed, start, truncation, label)

    def click(
        self, slot: str, grid: tuple[Shown, list[str]], picks: Picks, event: gr.SelectData
    ) -> tuple[Picks, str, str]:
        """Take the sample that was clicked into the chosen slot, and go to the next one when it is full."""
        shown, names = grid
        picks = picked(picks, slot, names[event.index], shown.z[event.index])
        slots = list(SLOTS)
        full = len(picks[slot]) == SLOTS[slot]
        return picks, in_words(picks), slots[(slots.index(slot) + full) % len(slots)]

    def walk(self, picks: Picks, steps: float, label: str | None) -> tuple[str, str, list[str]]:
        """Walk between the two samples that were chosen."""
        ends = [z for slot in ("walk from", "walk to") for _, z in picks[slot]]
        if len(ends) < 2:
            raise gr.Error("Click two samples first: one to walk from, one to walk to.")
        _, files = self._made(lambda: self.session.walk(ends, int(steps), label or None))
        return files[2], files[0], files

    def add(self, picks: Picks, label: str | None) -> tuple[str, list[str]]:
        """Add up what was chosen."""
        plus, minus, more = ([z for _, z in picks[slot]] for slot in "ABC")
        if not (plus or minus or more):
            raise gr.Error("Choose A, B or C, then click the samples of it.")
        _, files = self._made(lambda: self.session.sum(plus, minus, more, label or None))
        return files[0], files

    def _made(self, make: Callable[[], Shown]) -> tuple[Shown, list[str]]:
        try:
            shown = make()
        except UserError as error:
            raise gr.Error(str(error)) from None
        return shown, [str(path) for path in shown.write(self.folder)]


def build(session: Session, title: str, folder: Path) -> Any:
    """Return the page as Gradio's Blocks."""
    does, network, empty = Handlers(session, folder), session.network, dict[str, Any]((slot, []) for slot in SLOTS)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            f"## {title}\n{session.sampler.backend} on {session.sampler.device}; z is {network.latent_distribution}."
        )
        grid, picks = gr.State(), gr.State(empty)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            start = gr.Number(0, label="First image", precision=0, minimum=0)
            truncation = gr.Slider(0.1, 1.5, 1.0, step=0.05, label="Truncation: a factor on z")
            label = _labels(network)
        with gr.Row():
            back, go, on = gr.Button("Back"), gr.Button("Draw", variant="primary"), gr.Button("Next")
        slot = gr.Radio(list(SLOTS), value="walk from", label="A click on a sample fills")
        gallery = gr.Gallery(columns=COLUMNS, height="100%", allow_preview=False, show_label=False)
        said = gr.Markdown(in_words(empty))
        files = gr.File(label="These samples: a sheet, and their z for dcgan-generate --latents", file_count="multiple")
        with gr.Tab("Walk"):
            with gr.Row():
                steps, walked = gr.Slider(2, 96, STEPS, step=1, label="Images"), gr.Button("Show the walk")
            moving = gr.Image(type="filepath", label="There and back", height=280)
            strip = gr.Image(type="filepath", label="Image by image", show_label=False)
            walk_files = gr.File(label="Animation, strip and z", file_count="multiple")
        with gr.Tab(SUM):
            added = gr.Button(f"Show {SUM}")
            gr.Markdown("The sum, and eight neighbors of it:")
            total = gr.Image(type="filepath", label="The sum", show_label=False)
            sum_files = gr.File(label="Sheet and z", file_count="multiple")

        wanted, drawn = [seed, start, truncation, label], [grid, gallery, files]
        gr.on(
            [page.load, go.click, seed.submit, start.submit, truncation.release, label.input], does.draw, wanted, drawn
        )
        for button, by in ((back, -ROWS * COLUMNS), (on, ROWS * COLUMNS)):
            button.click(partial(does.turn, by), wanted, [start, *drawn])
        gallery.select(does.click, [slot, grid, picks], [picks, said, slot])
        walked.click(does.walk, [picks, steps, label], [moving, strip, walk_files])
        added.click(does.add, [picks, label], [total, sum_files])
    return page


def _labels(network: NetworkConfig) -> Any:
    """Return the choice of a label: a class, or several labels joined by `+`."""
    if len(network.label) > 1:
        return gr.Textbox(network.label[0], label=f"Labels, joined by +: {', '.join(network.label)}")
    classes = class_titles(network.label, network.classes)
    return gr.Dropdown([*classes], value=next(iter(classes), None), label="Label", visible=bool(classes))
