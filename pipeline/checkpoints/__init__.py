"""Checkpoints: how they are written, found, mirrored, and opened as networks."""
