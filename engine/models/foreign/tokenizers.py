"""Checks what a stranger's tokenizer may do to a text, before it gets any text.

A normalizer can double its text forty times, and a splitting pattern can take minutes on some texts, or fail. The
library runs both outside Python, where nothing stops them. So patterns with many ways to match are tried in a separate
process with limits, and steps that make texts much longer are refused. Ordinary tokenizers are only read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Final

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.foreign.checkpoints import choices

MAX_GROWTH: Final = 1000
MAX_STEPS: Final = 100
MAX_FILE_BYTES: Final = 256 << 20
TRIAL_SECONDS: Final = 10
TRIAL_BYTES: Final = 4 << 30
_MAX_REPEATS: Final = 12

_PARTS: Final = ("normalizer", "pre_tokenizer", "decoder")
_NESTED: Final = ("normalizers", "pretokenizers", "decoders")
# The most characters that one becomes: https://www.unicode.org/faq/normalization#12 (18 for U+FDFA).
_GROWTH: Final = {"ByteLevel": 2, "Precompiled": 18}

_TRIAL: Final = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
except Exception:  # whoever loads it says so
    sys.exit(0)
pieces = "a", " ", "1", "\\n", "\\r\\n", ".", "'", "_", "aB", "a ", " a", "1a", "a.", "\\u4e00", "\\u00e9", "=", "-"
for piece in pieces:
    for behind in ("", "!", "\\0", "\\n", "a"):
        for times in (30, 3000):
            tokenizer.encode(piece * times + behind)
"""


def check_tokenizer(file: Path) -> None:
    """Refuses a tokenizer.json that makes texts endless, or does not finish on some.

    Args:
        file: tokenizer.json; a missing file is not checked.

    Raises:
        UserError: quotes the setting.
    """
    if not file.is_file():
        return
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise _refused(file, "size", f"at most {MAX_FILE_BYTES >> 20} MiB", f"{size} bytes")
    try:
        fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return  # the library reports the error better
    if not isinstance(fields, dict):
        return
    for part in _PARTS:
        steps = list(_steps(fields.get(part)))
        if len(steps) > MAX_STEPS:
            raise _refused(file, part, f"at most {MAX_STEPS} steps", str(len(steps)))
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
        if growth > MAX_GROWTH:
            expected = f"steps that make a text at most {MAX_GROWTH} times as long"
            raise _refused(file, part, expected, f"steps that may make it {growth:.3g} times as long")
    patterns = [one for part in _PARTS for step in _steps(fields.get(part)) for one in _patterns(step)]
    doubtful = next((one for one in patterns if not is_plain(one)), None)
    if doubtful is not None and not _ends(file):
        expected = f"patterns that end on any text; tried for {TRIAL_SECONDS} s within {TRIAL_BYTES >> 30} GiB"
        raise _refused(file, "pattern", expected, doubtful[:200])


def is_plain(pattern: str) -> bool:
    """Whether no repeat in a pattern of the library contains something with several ways to match.

    Its character classes (`\\p{L}`) are read as `\\w`. A pattern that Python cannot read is not plain.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning: sets within sets mean something else in Python
            ways, repeats = choices(_as_python(pattern))
    except (ValueError, RecursionError, OverflowError, re.error):
        return False
    return ways <= 1_000_000 and repeats <= _MAX_REPEATS


def _ends(file: Path) -> bool:
    command = [sys.executable, "-I", "-c", _TRIAL, str(file), str(TRIAL_BYTES)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _steps(part: Any, depth: int = 8) -> Iterator[dict[str, Any]]:
    """The steps of a part of the tokenizer, including those within sequences."""
    if not isinstance(part, dict) or not depth:
        return
    yield part
    for name in _NESTED:
        inner = part.get(name)
        for step in inner if isinstance(inner, list) else ():
            yield from _steps(step, depth - 1)


def _growth(step: dict[str, Any]) -> float:
    """The factor by which a step may lengthen a text."""
    if step.get("type") == "Prepend":
        return max(1.0, len(str(step.get("prepend", ""))))
    if step.get("type") != "Replace":
        return float(_GROWTH.get(str(step.get("type")), 1))
    content = len(str(step.get("content", "")))
    pattern = step.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1.0, content / len(text))
    least = _least_width(pattern.get("Regex")) if isinstance(pattern, dict) else 0
    return max(1.0, content / least) if least else 1.0 + content  # an empty match occurs between all characters


def _least_width(pattern: Any) -> int:
    """The minimum number of characters of a match; 0 if Python cannot read the pattern."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(_parser.parse(_as_python(str(pattern))).getwidth()[0])
    except (ValueError, RecursionError, OverflowError, re.error):
        return 0


def _as_python(pattern: str) -> str:
    return re.sub(r"\\[pP]\{\^?[\w=]+\}", r"\\w", pattern)


def _patterns(step: dict[str, Any]) -> Iterator[str]:
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        yield pattern["Regex"]


def _refused(file: Path, field: str, expected: str, found: str) -> UserError:
    return UserError(
        "the tokenizer could make texts endless, or never finish on some",
        code="tokenizer-claims",
        where=f"{file}, {field}",
        expected=expected,
        found=found,
        remedy="download the tokenizer again, from a source that you trust, or name another with --tokenizer",
        exit_status=3,
    )
