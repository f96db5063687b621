"""How an update runs: from fixed inputs, kernel by kernel or as one CUDA graph."""
