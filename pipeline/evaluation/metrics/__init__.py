"""Metrics that compare samples with real images."""
