"""Rows of one response and a label: each gets another prompt's response, from which KTO estimates its KL.

Independent of files and tokens.
"""

from __future__ import annotations

from dataclasses import replace

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.messages import Message
from dpoeng.engine.data.shapes import PreferencePair, Turns


class Mismatcher:
    """Gives each row the response of the nearest earlier row with another prompt, or for the first rows of a later one.

    Rows appended to a file therefore leave all others, and their cached numbers, unchanged. TRL instead rotates the
    responses within a batch: the mismatched response then depends on the batch size, and belongs to the same prompt if
    two of its rows are adjacent.
    """

    def __init__(self) -> None:
        self._waiting: list[PreferencePair] = []
        self._last: PreferencePair | None = None
        self._before: PreferencePair | None = None  # the nearest row before `_last` with another prompt than its

    def add(self, row: PreferencePair) -> list[PreferencePair]:
        """Adds a row; returns the rows that are complete with it, in order."""
        if self._last is not None and self._last.prompt != row.prompt:
            self._before = self._last
        self._last = row
        if self._before is None:
            self._waiting.append(row)
            return []
        complete = [_with(first, row.chosen) for first in self._waiting]
        self._waiting = []
        return [*complete, _with(row, self._before.chosen)]

    def finish(self, where: str) -> None:
        """Raises UserError if all rows have the same prompt, so that no row can get a mismatched response."""
        if self._waiting:
            raise UserError(
                "all rows have the same prompt",
                code="data-one-prompt",
                where=where,
                expected="at least two prompts: KTO's reference point comes from responses to other prompts",
                found=f"{len(self._waiting)} rows of one prompt",
                remedy="add rows of other prompts",
                exit_status=3,
            )


def _with(row: PreferencePair, response: Turns) -> PreferencePair:
    """The row with a mismatched response, as text or messages like its own response."""
    if isinstance(row.chosen, str) and not isinstance(response, str):
        response = "\n".join(message["content"] for message in response if message["role"] == "assistant")
    elif isinstance(response, str) and not isinstance(row.chosen, str):
        answer: list[Message] = [{"role": "assistant", "content": response}]
        response = answer
    return replace(row, rejected=response)
