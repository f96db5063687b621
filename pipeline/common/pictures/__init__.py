"""Picture files: their formats by content, and their colors."""
