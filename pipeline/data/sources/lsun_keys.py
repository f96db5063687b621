"""Prints the keys of an lmdb from a given one on. A separate program, because lmdb may abort on a damaged database."""

import sys

import lmdb


def main() -> int:
    """Write one key a line to standard output; 1 when the database breaks on the way."""
    path, start = sys.argv[1], sys.argv[2].encode()
    write = sys.stdout.buffer.write
    try:
        with lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False) as environment:
            cursor = environment.begin().cursor()
            if cursor.set_range(start):
                for key in cursor.iternext(keys=True, values=False):
                    write(key + b"\n")
    except lmdb.Error:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
