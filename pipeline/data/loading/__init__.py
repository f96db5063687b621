"""Shards become training batches."""
