"""`dcgan-data dedup`: near-duplicates by the paper's semantic hash."""
