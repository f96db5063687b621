"""Running at scale: launching, generation, monitoring."""
