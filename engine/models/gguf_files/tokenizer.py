"""A tokenizer in the head of a GGUF file: tokens, merges, and llama.cpp's name of the way in which it splits text.

llama.cpp knows splitters by name, so a tokenizer whose splitter has none here is refused: another one gives other ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from dpoeng.engine.models.gguf_files.architecture import unwritable

_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_PATTERN: Final = {
    _WORDS + r"\p{N}" + _REST: "qwen2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Adds the tokenizer of a checkpoint's folder to a `gguf.GGUFWriter`.

    Args:
        writer: of the model's file.
        folder: holds tokenizer.json.
        vocab_size: rows of the embedding; ids without a token are marked unused.

    Raises:
        UserError: see `read_tokenizer`; or an id beyond the embedding.
    """
    import gguf

    content, splitter = read_tokenizer(folder)
    kinds = gguf.TokenType
    if (
        max([*content["model"]["vocab"].values(), *(one["id"] for one in content.get("added_tokens", []))])
        >= vocab_size
    ):
        raise unwritable(str(folder), f"ids beyond the {vocab_size} rows of the embedding")
    tokens = [f"[UNUSED{i}]" for i in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, kinds.NORMAL
    for added in content.get("added_tokens", []):
        number = added["id"]
        tokens[number], types[number] = added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], str]:
    """The content of a folder's tokenizer.json, and llama.cpp's name of its splitter.

    Raises:
        UserError: no byte-level BPE, or one whose splitter llama.cpp does not name.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise unwritable(str(folder), "no tokenizer.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    splitter = _splitter(content)
    if content["model"].get("type") != "BPE" or splitter is None:
        raise unwritable(f"{file}, pre_tokenizer", json.dumps(content.get("pre_tokenizer"))[:200])
    return content, splitter


def _splitter(content: dict[str, Any]) -> str | None:
    """llama.cpp's name of a pre-tokenizer; None where it has none that is known here."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[-1].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[-1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[-1].get("use_regex", True):
        return _BY_PATTERN.get((steps[0].get("pattern") or {}).get("Regex", ""))
    return None
