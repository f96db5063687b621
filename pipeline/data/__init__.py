"""Images on disk to shards, shards to training batches."""
