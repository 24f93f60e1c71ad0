"""Rows that were left out: never silently, and not more of them than the user allows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpoeng.cache.errors import UserError


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was left out, and why.

    Attributes:
        reason: stable short code; docs/data.md explains each.
        detail: what exactly was found.
    """

    source_file: str
    source_row: int
    reason: str
    detail: str


def check_reject_share(rejects: Sequence[Reject], rows: int, limit: float) -> None:
    """Stop where too many rows were left out.

    Args:
        rejects: the rows left out.
        rows: how many there were in all, good and bad.
        limit: the largest share allowed, 0 to 1.

    Raises:
        UserError: with the most frequent reasons and the first example of each.
    """
    if len(rejects) <= limit * rows:
        return
    first: dict[str, Reject] = {}
    for reject in rejects:
        first.setdefault(reject.reason, reject)
    reasons = Counter(reject.reason for reject in rejects).most_common(4)
    examples = [
        f"{reason} x {count}, first {first[reason].source_file}:{first[reason].source_row}: {first[reason].detail}"
        for reason, count in reasons
    ]
    raise UserError(
        f"{len(rejects)} of {rows} rows cannot be used.",
        code="data-rejects",
        where=rejects[0].source_file,
        expected=f"at most {limit:.3g} of the rows",
        found="\n            ".join(examples),
        remedy="mend these rows, leave them out with --where, or raise --max-reject-share",
        exit_status=3,
    )


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write rejects as JSON Lines: `source_file`, `source_row`, `reason`, `detail`."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for reject in rejects:
            record = {name: getattr(reject, name) for name in Reject.__slots__}
            # ASCII, so that halves of characters in a detail can be written too
            stream.write(json.dumps(record) + "\n")
