"""Checkpoints become ONNX files, engines and model repositories, proven equal."""
