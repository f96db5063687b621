"""How the ranks of a run come together."""
