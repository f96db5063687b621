"""Metrics of the field, the analyses of the paper, and a report of a run."""
