"""The Grafana dashboards as code: `python -m deploy.grafana.dashboards` writes training.json and generation.json.

Each row answers one question about a run. tests/metrics sends every query to a real Prometheus.
"""

import json
from pathlib import Path
from typing import Literal

from deploy.grafana.panels import Dashboard, Panel, stat, to_json

FOLDER = Path(__file__).parent

RUN = '{run=~"$run"}'
SERVED = '{run=~"$run", instance!=""}'  # excludes pushed values: their jump at the end is no rate
LEFT = f"max(dcgan_train_target_images{RUN}) - max(dcgan_train_seen_images{RUN})"
RATE = f"max(rate(dcgan_train_images_total{SERVED}[$__rate_interval]))"
OF_A_RUN = f"on (job, instance) group_left (run) dcgan_train_info{SERVED}"
PHASES = f"rate(dcgan_train_phase_seconds_total{SERVED}[5m])"  # longer than the time between two checkpoints

TRAINING = Dashboard(
    uid="dcgan-training",
    title="DCGAN training",
    runs="label_values(dcgan_train_info, run)",
    rows={
        "How far is it, and how long will it take?": [
            stat("Seen", f"max(dcgan_train_seen_images{RUN}) / max(dcgan_train_target_images{RUN})", "percentunit"),
            stat(
                "Time left", f"({LEFT}) / max(run:dcgan_train_images:rate10m{RUN})", "s", about="At the current rate."
            ),
            stat("Images a second", RATE),
            stat("Processes", f"max(dcgan_train_processes{RUN})"),
            stat(
                "Since the last step",
                f"time() - max(dcgan_train_last_step_timestamp_seconds{RUN})",
                "s",
                red_above=600,
            ),
            stat("Alerts", 'count(ALERTS{alertstate="firing", run=~"$run"}) or vector(0)', red_above=1),
        ],
        "Is it fast?": [
            Panel(
                "Images a second",
                {
                    f"max by (run) (rate(dcgan_train_images_total{SERVED}[$__rate_interval]))": "{{run}}",
                    f"run:dcgan_train_images:rate10m{RUN}": "{{run}}, 10 minutes",
                },
                about="Includes the time of grids, evaluations and checkpoints.",
                width=6,
            ),
            Panel(
                "Where the time goes",
                {f"sum by (phase) ({PHASES}) / scalar(sum({PHASES}))": "{{phase}}"},
                "percentunit",
                bounds=(0, 1),
                stacked=True,
                about="data_wait above 30 %: the loader cannot keep up (DcganDataWait).",
                width=6,
            ),
            Panel(
                "Duration of a step",
                {
                    f"histogram_quantile({q}, sum by (le) "
                    f"(rate(dcgan_train_step_duration_seconds_bucket{SERVED}[$__rate_interval])))": name
                    for q, name in ((0.5, "median"), (0.95, "95th percentile"))
                },
                "s",
                about="Time on the host, including the wait for images. A GPU may still be working.",
                width=6,
            ),
            Panel(
                "Images read ahead",
                {f"min by (run) (dcgan_train_prefetched_images{RUN})": "{{run}}"},
                about="On the node with the fewest. At 0 training waits for the store: see runtime.lookahead_mb.",
                width=6,
            ),
        ],
        "Is it learning?": [
            Panel(
                "D's output",
                {f"max by (batch) (dcgan_train_discriminator_output{RUN})": "{{batch}}"},
                "percentunit",
                bounds=(0, 1),
                about="D's probability that an image is real. Both at 0.5: D cannot tell. 1 and 0: D has won.",
            ),
            Panel("Losses", {f"max by (network) (dcgan_train_loss{RUN})": "{{network}}"}),
            Panel(
                "Gradients",
                {f"max by (network) (dcgan_train_gradient_norm{RUN})": "{{network}}"},
                logarithmic=True,
                about="L2 norm over all weights of a network.",
            ),
        ],
        "Is it collapsing?": [
            Panel(
                "Diversity of samples",
                {f"max by (run) (dcgan_train_sample_diversity_ratio{RUN})": "{{run}}"},
                "percentunit",
                red_below=0.2,
                bounds=(0, 1),
                about="Variation of a pixel over a fake batch, relative to a real batch.",
            ),
            Panel(
                "Sliced Wasserstein distance",
                {'max by (metric) (dcgan_train_quality{run=~"$run", metric=~"swd.*"})': "{{metric}}"},
                about="Samples against real images, by resolution; lower is better.",
            ),
            Panel(
                "MS-SSIM between samples",
                {'max by (metric) (dcgan_train_quality{run=~"$run", metric=~"ms_ssim.*"})': "{{metric}}"},
                bounds=(0, 1),
                about="Similarity of two samples. Far above that of real images, samples repeat.",
            ),
        ],
        "Is it stuck, and what work would be lost?": [
            Panel(
                "Since the last step",
                {f"time() - max by (run) (dcgan_train_last_step_timestamp_seconds{RUN})": "{{run}}"},
                "s",
                red_above=600,
            ),
            Panel(
                "Since the last checkpoint",
                {f"time() - max by (run) (dcgan_train_checkpoint_timestamp_seconds{RUN})": "{{run}}"},
                "s",
                red_above=3600,
                about="The work that would be lost if the run died now.",
            ),
            Panel(
                "Faults",
                {
                    f"max by (run) (dcgan_train_nonfinite_steps_total{RUN})": "updates skipped for NaN",
                    f"max by (run) (dcgan_train_mirror_failures_total{RUN})": "checkpoints not mirrored",
                    f"max by (run) (dcgan_train_restarts{RUN})": "restarts",
                    f"max by (run) (dcgan_train_launcher_restarts{RUN})": "restarts in place",
                },
            ),
            Panel(
                "Waiting for other ranks",
                {f"max by (run) (dcgan_train_waiting_seconds{RUN})": "{{run}}"},
                "s",
                red_above=300,
                about="Some ranks have not come, or have not come again. The log says which.",
            ),
            Panel(
                "Time of a checkpoint",
                {f"max by (run) (dcgan_train_checkpoint_duration_seconds{RUN})": "{{run}}"},
                "s",
                about="Time that training waited for it.",
            ),
            Panel(
                "Memory",
                {f"process_resident_memory_bytes * {OF_A_RUN}": "{{instance}}"},
                "bytes",
                about="Resident memory of local rank 0 on every node. For GPU memory see the DCGM exporter.",
            ),
            Panel(
                "CPU",
                {f"rate(process_cpu_seconds_total[$__rate_interval]) * {OF_A_RUN}": "{{instance}}"},
                about="Cores in use by local rank 0 on every node.",
            ),
        ],
    },
)


def part_panels(program: Literal["generate", "build"], noun: str) -> list[Panel]:
    """Return the panels that generation and data set builds share: progress, speed and health.

    A part that was also pushed counts once. Images that an earlier start made count as well.
    """
    done = f"dcgan_{program}_images_total{RUN} + dcgan_{program}_skipped_images_total{RUN}"
    if program == "build":
        done += f" + dcgan_build_refused_images_total{RUN}"
    done = f"sum(max by (run, part) ({done}))"
    target = f"sum(max by (run, part) (dcgan_{program}_target_images{RUN}))"
    rate = f"sum(max by (run, part) (rate(dcgan_{program}_images_total{SERVED}[$__rate_interval])))"
    recent = f"sum(part:dcgan_{program}_images:rate10m{RUN})"
    return [
        stat(f"{noun} done", f"{done} / {target}", "percentunit"),
        stat("Time left", f"({target} - {done}) / {recent}", "s", about="At the current rate."),
        stat("Images a second", rate),
        stat("Parts", f"count(max by (run, part) (dcgan_{program}_target_images{RUN}))"),
        stat("Failed parts", f"sum(max by (run, part) (dcgan_{program}_part_failed{RUN}))", red_above=1),
        stat(
            "Since the last shard",
            f"time() - max(dcgan_{program}_last_shard_timestamp_seconds{RUN})",
            "s",
            red_above=1800,
        ),
        Panel(
            "Images a second",
            {f"max by (run, part) (rate(dcgan_{program}_images_total{SERVED}[$__rate_interval]))": "{{run}} {{part}}"},
        ),
        Panel(
            "Written",
            {
                f"max by (run, part) (rate(dcgan_{program}_written_bytes_total{SERVED}[$__rate_interval]))": (
                    "{{run}} {{part}}"
                )
            },
            "Bps",
            about="Counted when a shard is finished.",
        ),
    ]


GENERATION = Dashboard(
    uid="dcgan-generation",
    title="DCGAN generation and data sets",
    runs='label_values({__name__=~"dcgan_(generate|build)_info"}, run)',
    rows={
        "Generation": [
            *part_panels("generate", "Samples"),
            Panel(
                "Busy threads by phase",
                {
                    "sum by (phase) (max by (run, part, phase) "
                    f"(rate(dcgan_generate_phase_seconds_total{SERVED}[$__rate_interval])))": "{{phase}}"
                },
                about="Average number of busy threads. sample near 1: the model limits the rate.",
            ),
            Panel(
                "Bytes an image",
                {
                    f"sum(max by (run, part) (dcgan_generate_written_bytes_total{RUN})) / "
                    f"sum(max by (run, part) (dcgan_generate_images_total{RUN}))": "written"
                },
                "bytes",
            ),
            Panel(
                "Refused models",
                {f"max by (run) (dcgan_generate_model_refused{RUN})": "{{run}}"},
                red_above=1,
                about="1 if the model was damaged, or made for another device or version.",
            ),
            Panel(
                "Skipped",
                {f"max by (run, part) (dcgan_generate_skipped_images_total{RUN})": "{{run}} {{part}}"},
                about="Images that an earlier start made.",
            ),
        ],
        "Data sets": [
            *part_panels("build", "Pictures"),
            Panel(
                "Refused pictures",
                {f"max by (run, part) (dcgan_build_refused_images_total{RUN})": "{{run}} {{part}}"},
                about="Pictures that cannot be used. refused.txt beside the data set lists them.",
            ),
        ],
    },
)

DASHBOARDS = {"training.json": TRAINING, "generation.json": GENERATION}


def main() -> None:
    """Write the dashboards."""
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / name).write_text(json.dumps(to_json(dashboard), indent=1) + "\n")


if __name__ == "__main__":
    main()
