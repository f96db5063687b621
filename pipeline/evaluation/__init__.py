"""What the paper measured, and the metrics of the field."""
