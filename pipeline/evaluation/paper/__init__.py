"""The analyses of the paper (Radford et al. 2015)."""
