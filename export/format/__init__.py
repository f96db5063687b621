"""Exported files and the cards beside them."""
