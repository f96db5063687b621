"""`dcgan-data build`: a source becomes shards."""
