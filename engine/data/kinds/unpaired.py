"""Rows of one response and a label: each gets the response of another prompt, from which KTO estimates its KL.

Knows nothing of files or tokens.
"""

from __future__ import annotations

from dataclasses import replace

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.messages import Message
from dpoeng.engine.data.shapes import PreferencePair, Turns


class Mismatcher:
    """Gives each row the response of the nearest earlier row with another prompt; the first rows, of the nearest later.

    So rows that are appended to a file leave all others, and their numbers in the cache, as they were. TRL rotates the
    responses within a batch instead: the mismatched response then depends on the batch size, and is one of the same
    prompt where two of its rows follow each other.
    """

    def __init__(self) -> None:
        self._waiting: list[PreferencePair] = []
        self._last: PreferencePair | None = None
        self._before: PreferencePair | None = None  # the nearest row before `_last` with another prompt than its

    def add(self, row: PreferencePair) -> list[PreferencePair]:
        """One more row -> the rows that are complete with it, in their order."""
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
        """Raises UserError where all rows have one prompt, so that no response is another prompt's."""
        if self._waiting:
            raise UserError(
                "all rows have the same prompt",
                code="data-one-prompt",
                where=where,
                expected="two prompts or more: KTO's reference point is taken from responses to other prompts",
                found=f"{len(self._waiting)} rows of one prompt",
                remedy="add rows of other prompts",
                exit_status=3,
            )


def _with(row: PreferencePair, response: Turns) -> PreferencePair:
    """The row with a mismatched response, a text or messages as its own is."""
    if isinstance(row.chosen, str) and not isinstance(response, str):
        response = "\n".join(message["content"] for message in response if message["role"] == "assistant")
    elif isinstance(response, str) and not isinstance(row.chosen, str):
        answer: list[Message] = [{"role": "assistant", "content": response}]
        response = answer
    return replace(row, rejected=response)
