"""Sources of pictures: one file a format, all with the interface of `interface.py`."""
