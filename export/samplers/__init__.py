"""One interface to every way of running a generator."""
