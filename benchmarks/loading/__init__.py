"""What data_loading.py and indexed_loading.py measure, and with what."""
