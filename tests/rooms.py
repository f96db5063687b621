"""The rooms of the product in the order in which they may import each other."""

ROOMS = (
    "pipeline.common",
    "pipeline.config",
    "pipeline.model",
    "pipeline.checkpoints",
    "pipeline.data",
    "pipeline.evaluation",
    "pipeline.training",
    "pipeline.train",
    "export.format",
    "export.samplers",
    "export.builders",
    "export.hub",
    "export.explore",
    "export.benchmark",
    "export.cli",
    "deploy",
)
"""From the ground up."""
