"""One file a format, each behind the small interface of `interface.py`."""
