"""Other programs' records of a run: Weights & Biases, MLflow."""
