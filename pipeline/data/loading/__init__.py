"""Training batches from shards: the shuffle, the loader, shards in memory and on the local disk."""
