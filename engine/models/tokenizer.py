"""Chooses and loads the tokenizer and chat template that SFT used. Needs no torch.

Files next to an SFT adapter are what SFT used, so they take precedence over the base's. Independent of pairs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.foreign.tokenizers import check_tokenizer
from dpoeng.engine.models.sources import ModelSource, find_tokenizer

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_MAX_TEMPLATE_BYTES = 16 << 20
_MORE_TEMPLATES = "additional_chat_templates"
# Files that `save_pretrained` of a tokenizer may write.
_FILES = re.compile(
    r"(tokenizer.*\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"tekken\.json|chat_template\.(jinja|json))"
)


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """The source of tokenizer and chat template.

    Attributes:
        source: folder (or GGUF file) to load the tokenizer from.
        template: file whose template replaces the tokenizer's own, or None.
        base: the model's own tokenizer, if another one was chosen; else None.
    """

    source: ModelSource
    template: Path | None = None
    base: ModelSource | None = None

    def record(self) -> dict[str, str]:
        """What phase two needs to find it again; empty for the model's own tokenizer."""
        if self.base is None:
            return {}
        name = self.source.name if self.source.revision else str(self.source.folder.resolve())
        more = {"chat_template": str(self.template.resolve())} if self.template is not None else {}
        return {"tokenizer": name, **more}


def choose_tokenizer(model: ModelSource, adapter: str | None, tokenizer: str | None) -> TokenizerChoice:
    """Chooses the tokenizer that the user named, or the one next to the SFT adapter, or the model's.

    Args:
        model: the base.
        adapter: the SFT adapter's folder or hub id.
        tokenizer: `--tokenizer`: a folder or hub id.

    Raises:
        UserError: no tokenizer there.
    """
    if tokenizer is not None:
        source = find_tokenizer(tokenizer)
        if not source.gguf and _vocabulary(source.folder) is None:
            raise UserError(
                f"no tokenizer at {tokenizer}",
                code="tokenizer-missing",
                where="--tokenizer",
                expected=f"a folder with one of {', '.join(_VOCABULARIES[:2])}, or a hub id",
                found=str(source.folder),
                remedy="name the folder that the tokenizer was saved to",
            )
        return TokenizerChoice(source, base=model)
    if adapter is None:
        return TokenizerChoice(model)
    beside = find_tokenizer(adapter)
    for folder in _companions(beside.folder):
        if _vocabulary(folder) is not None:
            found_tokenizer = ModelSource(str(folder), folder, ()) if folder != beside.folder else beside
            return TokenizerChoice(found_tokenizer, base=model)
        if (template := _template_file(folder)) is not None:
            return TokenizerChoice(model, template, base=model)
    return TokenizerChoice(model)


def recorded_tokenizer(model: ModelSource, reference: Mapping[str, Any]) -> TokenizerChoice:
    """The tokenizer named in a view's `reference` record, or else the model's.

    Raises:
        UserError: it is no longer there.
    """
    if "tokenizer" not in reference:
        return TokenizerChoice(model)
    template = reference.get("chat_template")
    return TokenizerChoice(find_tokenizer(reference["tokenizer"]), Path(template) if template else None, base=model)


def load_chosen(choice: TokenizerChoice) -> Any:
    """The tokenizer with its template.

    Raises:
        UserError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(choice.source)
    if choice.template is not None:
        tokenizer.chat_template = _read_template(choice.template)
    return tokenizer


def remark_on(choice: TokenizerChoice, tokenizer: Any) -> str:
    """Describes how a tokenizer differs from the model's; empty if it does not."""
    if choice.base is None:
        return ""
    where = choice.template or choice.source.folder
    try:
        model_tokenizer = load_tokenizer(choice.base)
    except UserError:
        return f"tokenizer of {where}: the model has none"
    differences = tokenizer_differences(tokenizer, model_tokenizer)
    return f"tokenizer of {where}; its {', '.join(differences)} not the model's" if differences else ""


def tokenizer_differences(one: Any, other: Any) -> list[str]:
    """How two tokenizers differ: chat template, special tokens, ids of tokens."""
    differing = []
    if getattr(one, "chat_template", None) != getattr(other, "chat_template", None):
        differing.append("chat template is")
    if one.special_tokens_map != other.special_tokens_map:
        names = {
            name
            for name in {*one.special_tokens_map, *other.special_tokens_map}
            if one.special_tokens_map.get(name) != other.special_tokens_map.get(name)
        }
        differing.append(f"special tokens ({', '.join(sorted(names))}) are")
    if one.get_vocab() != other.get_vocab():
        differing.append("token ids are")
    return differing


def copy_tokenizer(choice: TokenizerChoice, into: Path) -> None:
    """Copies the tokenizer and template that made the texts to a result's folder, instead of the model's."""
    if choice.base is None and _vocabulary(into) is not None:
        return  # the model's own, copied with its other files
    if choice.source.gguf:
        if _vocabulary(into) is None:
            load_tokenizer(choice.source).save_pretrained(into)
    elif choice.source is not choice.base or _vocabulary(into) is None:
        _copy_files(choice.source.folder, into)
    if choice.template is not None and (template := _read_template(choice.template)) is not None:
        _write_template(template, into)


def _copy_files(folder: Path, into: Path) -> None:
    for file in into.iterdir():
        if _FILES.fullmatch(file.name):
            file.unlink()
    shutil.rmtree(into / _MORE_TEMPLATES, ignore_errors=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and _FILES.fullmatch(file.name):
            shutil.copyfile(file, into / file.name)
    if (folder / _MORE_TEMPLATES).is_dir():
        shutil.copytree(folder / _MORE_TEMPLATES, into / _MORE_TEMPLATES)


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a model's folder has a tokenizer."""
    return source.gguf or _vocabulary(source.folder) is not None


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: the model has none.
    """
    if source.gguf:
        from dpoeng.engine.models.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(source.weight_files[0])
    _require_sentencepiece(source)
    check_tokenizer(source.folder / "tokenizer.json")
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"no usable tokenizer beside the model {source.name}",
            code="tokenizer-missing",
            where=str(source.folder),
            expected="tokenizer.json and tokenizer_config.json",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="copy the tokenizer files from the model that this one was trained from",
        ) from error
    # transformers reads chat_template.json only for processors, so the tokenizer would have no template.
    if tokenizer.chat_template is None and (file := source.folder / "chat_template.json").is_file():
        tokenizer.chat_template = _read_template(file)
    return tokenizer


@contextmanager
def without_torch(*models: str | None) -> Iterator[None]:
    """Imports transformers without torch: tokenizers do not need it, and loading it takes seconds.

    Does nothing if either is imported already, or for a GGUF file, whose reader needs torch. Afterwards transformers is
    unloaded, because it has recorded that torch is missing: code that needs models imports it again.
    """
    if "torch" in sys.modules or "transformers" in sys.modules or any(str(name).endswith(".gguf") for name in models):
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment] # how an import is refused
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # its warning that torch is missing
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
        del sys.modules["torch"]
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
            del sys.modules[name]


def _require_sentencepiece(source: ModelSource) -> None:
    """Raises if the vocabulary is a sentencepiece model and no installed package can read it."""
    if _vocabulary(source.folder) == "tokenizer.model":
        lacking = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
        if lacking:
            raise UserError(
                "the tokenizer is a sentencepiece model, and the packages that read it are not installed",
                code="tokenizer-missing",
                where=str(source.folder / "tokenizer.model"),
                expected="tokenizer.json, or the packages sentencepiece and protobuf",
                found=f"not installed: {', '.join(name.replace('google.', '') for name in lacking)}",
                remedy="pip install sentencepiece protobuf; or save the tokenizer once with transformers, which writes "
                "tokenizer.json",
            )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _companions(folder: Path) -> list[Path]:
    """Folders that may have an adapter's files: next to it, or next to its checkpoints."""
    parent = folder.resolve().parent
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None
    return [folder, *([parent] if is_checkpoint or not (parent / "config.json").is_file() else [])]


def _vocabulary(folder: Path) -> str | None:
    return next((name for name in _VOCABULARIES if (folder / name).is_file()), None)


def _template_file(folder: Path) -> Path | None:
    files = (folder / name for name in _TEMPLATES)
    return next((file for file in files if file.is_file() and _read_template(file) is not None), None)


def _read_template(file: Path) -> str | dict[str, str] | None:
    """The template in a file, or its templates by name (`default`, `tool_use`, ...); None if it has none.

    Raises:
        UserError: the file has no valid template.
    """
    if (size := file.stat().st_size) > _MAX_TEMPLATE_BYTES:
        raise UserError(
            "the chat template is too large",
            code="tokenizer-claims",
            where=str(file),
            expected=f"at most {_MAX_TEMPLATE_BYTES >> 20} MiB",
            found=f"{size} bytes",
            remedy="save the tokenizer of SFT again, or name it with --tokenizer",
            exit_status=3,
        )
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        more = sorted((file.parent / _MORE_TEMPLATES).glob("*.jinja"))
        named = {one.stem: one.read_text(encoding="utf-8") for one in more}
        return {"default": text, **named} if named else text
    try:
        content = json.loads(text)
        content = content.get("chat_template") if isinstance(content, dict) else content
        if content is None or isinstance(content, str):
            return content
        named = {one["name"]: one["template"] for one in content} if isinstance(content, list) else dict(content)
        if not named or not all(isinstance(one, str) for one in named.values()):
            raise ValueError("a template that is not text")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "cannot read the chat template",
            code="tokenizer-missing",
            where=str(file),
            expected="chat_template: a text, or a list of templates with name and template",
            found=f"{type(error).__name__}: {error}",
            remedy="save the tokenizer of SFT again, or name it with --tokenizer",
        ) from error
    return named


def _write_template(template: str | dict[str, str], into: Path) -> None:
    """Writes templates where transformers looks first."""
    named = {"default": template} if isinstance(template, str) else dict(template)
    shutil.rmtree(into / _MORE_TEMPLATES, ignore_errors=True)
    (into / "chat_template.json").unlink(missing_ok=True)
    if "default" in named:
        (into / "chat_template.jinja").write_text(named.pop("default"), encoding="utf-8")
    for name, text in named.items():
        (into / _MORE_TEMPLATES).mkdir(exist_ok=True)
        (into / _MORE_TEMPLATES / f"{name}.jinja").write_text(text, encoding="utf-8")
