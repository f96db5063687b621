"""Deploying a model: a checkpoint becomes ONNX, an engine, a measured sampler."""
