"""The prompts of a round: texts for the new pairs, token ids for sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import IdArray, as_ids
from dpoeng.engine.data.encoding import encode_response
from dpoeng.engine.data.messages import Message
from dpoeng.engine.data.prompts import place_prompt, read_prompt
from dpoeng.engine.data.readers import FORMATS, read_rows
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.strict_json import RowFault


@dataclass(frozen=True, slots=True)
class RoundPrompt:
    """A prompt: a pair that contains it, whose responses are not used, and its token ids, int32 [P]."""

    pair: PreferencePair
    ids: IdArray

    def row(self, chosen: str, rejected: str) -> dict[str, Any]:
        """The row that pairs these answers, as phase one reads it."""
        return as_row(replace(self.pair, chosen=_turns(self.pair, chosen), rejected=_turns(self.pair, rejected)))


def as_row(pair: PreferencePair) -> dict[str, Any]:
    """The JSON Lines row from which phase one reads this pair again."""
    row: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    row |= {"tools": pair.tools} if pair.tools is not None else {}
    row |= {"chat_template_kwargs": pair.chat_template_kwargs} if pair.chat_template_kwargs is not None else {}
    return {**{name: value for name, value in pair.extra.items() if name not in row}, **row}


def distinct_prompts(
    pairs: Iterable[PreferencePair], tokenizer: Any, max_length: int
) -> tuple[list[RoundPrompt], list[tuple[PreferencePair, str]]]:
    """Returns each prompt once, in order, and the unusable ones with the reason.

    Args:
        pairs: pairs with the prompts.
        tokenizer: the reference's tokenizer.
        max_length: limit for prompt and response in tokens; the prompt must leave at least one.
    """
    found: dict[bytes, RoundPrompt] = {}
    left_out: dict[str, tuple[PreferencePair, str]] = {}
    for pair in pairs:
        asked = replace(pair, chosen=_turns(pair, "."), rejected=_turns(pair, "."), extra={})
        try:
            encoded = encode_response(asked, tokenizer)
            if encoded.fault is not None:
                raise encoded.fault
        except RowFault as fault:
            left_out.setdefault(str(pair.prompt), (asked, f"{fault.reason}: {fault.detail}"))
            continue
        ids = as_ids(encoded.ids[: encoded.start])
        if 0 < len(ids) < max_length:
            found.setdefault(ids.tobytes(), RoundPrompt(asked, ids))
        else:
            left_out.setdefault(str(pair.prompt), (asked, f"{len(ids)} tokens; the limit is {max_length - 1}"))
    return list(found.values()), list(left_out.values())


def read_prompt_file(file: Path, example: PreferencePair, prompt_format: str | None) -> list[PreferencePair]:
    """Reads prompts: one per line of a text file, or `prompt` in each row of a file as for pairs.

    Args:
        file: the file.
        example: a pair of the run; if its prompt is messages, a text becomes a user's message.
        prompt_format: the run's prompt format, applied to texts; or None.

    Raises:
        UserError: the file cannot be read, or a row has no prompt.
    """
    chat = isinstance(example.prompt, list)

    def pair_of(text: str | list[Message], row: int, more: dict[str, Any]) -> PreferencePair:
        if isinstance(text, str) and chat:
            text = [{"role": "user", "content": text}]
        elif isinstance(text, str) and prompt_format:
            text = prompt_format.replace("{prompt}", text)
        return PreferencePair(text, "", "", str(file), row, **more)

    try:
        if file.suffix not in FORMATS:
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            return [pair_of(line.strip(), number, {}) for number, line in lines if line.strip()]
        found = []
        for number, row in read_rows(file):
            if isinstance(row, RowFault):
                raise row
            given = read_prompt(row, {}, single_answers=True)
            if not given.prompt:
                raise RowFault("empty-prompt", f"row {number} has no prompt")
            more = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
            found.append(pair_of(place_prompt(given, given.prompt, prompt_format), number, more))
    except (OSError, UnicodeDecodeError, RowFault) as error:
        raise UserError(
            "cannot read the prompts of this round",
            code="round-prompts",
            where=f"--prompts {file}",
            expected="a text file with one prompt per line, or a file of rows with `prompt`",
            found=error.detail if isinstance(error, RowFault) else str(error),
            remedy="correct the file, or remove --prompts to use the run's own prompts",
            exit_status=3,
        ) from error
    return found


def of_round(prompts: Sequence[RoundPrompt], count: int | None, number: int) -> list[RoundPrompt]:
    """The prompts of round `number`, from 1: all, or the next `count`, starting again after the last prompt."""
    if count is None or count >= len(prompts):
        return list(prompts)
    first = (number - 1) * count
    return [prompts[place % len(prompts)] for place in range(first, first + count)]


def _turns(pair: PreferencePair, text: str) -> str | list[Message]:
    return text if isinstance(pair.prompt, str) else [{"role": "assistant", "content": text}]
