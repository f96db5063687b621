"""What happens at each exit code, as docs/operations.md promises it: what programs and manifests must keep."""

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/operations.md"
CODES, LIMITS = "| code | meaning |", "| step | `again` at most |"
DISRUPTED = -1
"""In place of an exit code: a pod that was drained, preempted or evicted, or whose node was lost."""


@cache
def rows(head: str) -> list[dict[str, str]]:
    """Return the rows of the table whose first line begins with `head`, by the names of their columns."""
    text = PAGE.read_text()
    assert head in text, f"{PAGE.name} has no table {head}"
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()
    names, _, *found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[0] == "|"]
    return [dict(zip(names, row, strict=True)) for row in found]


def promises(column: str) -> dict[int, str]:
    """Return what is promised for each exit code under an engine: done, ends, fails, again or always."""
    found = {}
    for row in rows(CODES):
        for code in re.findall(r"\d+", row["code"]) or [DISRUPTED]:
            found[int(code)] = row[column]
    assert set(found.values()) <= {"done", "ends", "fails", "again", "always"}, column
    return found


def limits(column: str) -> dict[str, str]:
    """Return a column of the table of limits by step; the JobSet's step is `train, JobSet`."""
    return {
        step.replace("`", ""): row[column]
        for row in rows(LIMITS)
        for step in ([row["step"]] if "JobSet" in row["step"] else row["step"].split(", "))
    }
