"""The adversarial loop, and everything that it does beside an update."""
