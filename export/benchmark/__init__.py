"""`dcgan-export bench`: sampling throughput and latency."""
