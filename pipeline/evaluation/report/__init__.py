"""`dcgan-eval report`: one page about a run."""
