"""Sources that others have packed for a program of theirs: arrays, TFRecord, MDS, litdata."""
