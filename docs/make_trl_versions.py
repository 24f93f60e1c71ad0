"""Reads the signatures of TRL and transformers out of their wheels, and writes what dpoeng knows of their names.

    python docs/make_trl_versions.py WHEELS

WHEELS is a folder outside the repository; what it lacks is downloaded by pip (about 400 MB in all). No release is
imported: most cannot be beside today's Python and torch, so the sources are read by their syntax tree. Written are
`engine/config/trl_names.json`, which the program looks names up in, and `docs/trl-versions.md`, the same for people.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "engine" / "config" / "trl_names.json"
PAGE = ROOT / "docs" / "trl-versions.md"

# The first release of every minor version of TRL from 0.8, and five of 0.7. Of transformers nearly every minor version.
TRL = (
    "0.7.0 0.7.2 0.7.5 0.7.8 0.7.11 0.8.0 0.9.2 0.10.1 0.11.0 0.12.0 0.13.0 0.14.0 0.15.0 0.16.0 0.17.0 0.18.0 0.19.0 "
    "0.20.0 0.21.0 0.22.0 0.23.0 0.24.0 0.25.0 0.26.0 0.27.0 0.28.0 0.29.0 1.0.0 1.1.0 1.2.0 1.3.0 1.4.0 1.5.0 1.6.0 "
    "1.7.0 1.8.0 1.9.0 1.10.0 1.11.0 1.12.0 1.13.0 1.14.0 1.15.0 1.16.0"
).split()
TRANSFORMERS = (
    "4.31.0 4.35.0 4.36.0 4.37.0 4.38.0 4.39.0 4.40.0 4.41.0 4.42.0 4.43.0 4.44.0 4.45.0 4.46.0 4.47.0 4.48.0 4.49.0 "
    "4.50.0 4.51.0 4.52.0 4.53.0 4.54.0 4.55.0 4.56.0 4.57.1 5.0.0 5.1.0 5.2.0 5.3.0 5.4.0 5.6.0 5.8.0 5.10.1 5.12.0 "
    "5.13.0 5.14.0 5.15.0 5.16.0 5.18.0 5.20.0 5.23.0"
).split()
VERSIONS = {"trl": TRL, "transformers": TRANSFORMERS}

# class in a wheel -> the owner under which its names are known, where it may stand
OWNERS = {
    "trl": {
        "DPOTrainer": ("DPOTrainer", ("trl/trainer/dpo_trainer.py",)),
        "DPOConfig": ("DPOConfig", ("trl/trainer/dpo_config.py",)),
        "BaseConfig": ("DPOConfig", ("trl/trainer/base_config.py",)),
        "_BaseConfig": ("DPOConfig", ("trl/trainer/base_config.py",)),
        "ModelConfig": ("ModelConfig", ("trl/trainer/model_config.py",)),
        "ScriptArguments": ("ScriptArguments", ("trl/scripts/utils.py", "trl/utils.py")),
        "DPOScriptArguments": ("ScriptArguments", ("trl/commands/cli_utils.py",)),
        "DpoScriptArguments": ("ScriptArguments", ("trl/commands/cli_utils.py",)),
    },
    "transformers": {"TrainingArguments": ("TrainingArguments", ("transformers/training_args.py",))},
}
ORDER = ("DPOConfig", "DPOTrainer", "TrainingArguments", "ModelConfig", "ScriptArguments")


def main() -> None:
    """Downloads what is missing, reads all, writes both files."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    history: dict[tuple[str, str], dict[str, str]] = {}  # (name, owner) -> version -> default
    for package, versions in VERSIONS.items():
        for version in versions:
            for owner, name, default in signatures(wheel(folder, package, version), package):
                history.setdefault((name, owner), {})[version] = default
    wanted = [[version, required_transformers(wheel(folder, "trl", version))] for version in TRL]
    requires = [pair for before, pair in pairwise([["", ""], *wanted]) if pair[1] != before[1]]
    known = {"versions": VERSIONS, "requires": requires, "names": spans(history)}
    DATA.write_text(compact(known), encoding="utf-8")
    PAGE.write_text(page(known), encoding="utf-8")


def wheel(folder: Path, package: str, version: str) -> Path:
    """The wheel, downloaded if it is not there."""
    path = folder / f"{package}-{version}-py3-none-any.whl"
    if not path.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(folder), f"{package}=={version}"], check=True)
    return path


def required_transformers(path: Path) -> str:
    """The oldest transformers that a wheel's metadata accept."""
    with zipfile.ZipFile(path) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(file).decode()
    lines = re.findall(r"^Requires-Dist: (transformers\b.*)$", text, re.MULTILINE)
    plain = [requirement for requirement in map(Requirement, lines) if requirement.marker is None]
    (least,) = {bound.version for found in plain for bound in found.specifier if bound.operator == ">="}
    return least


def signatures(path: Path, package: str) -> Iterator[tuple[str, str, str]]:
    """(owner, name, default as source text) of every argument; a field's default wins over its base class's."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        files = {file for _, places in OWNERS[package].values() for file in places if file in names}
        classes = [
            node
            for file in sorted(files)
            for node in ast.parse(archive.read(file)).body
            if isinstance(node, ast.ClassDef) and node.name in OWNERS[package]
        ]
    # Base classes first, so that what a subclass overrides comes last.
    for node in sorted(classes, key=lambda c: c.name in ("DPOConfig", "DPOScriptArguments")):
        owner = OWNERS[package][node.name][0]
        found = trainer_arguments(node) if owner == "DPOTrainer" else dataclass_fields(node)
        for name, default in found:
            yield owner, name, default


def trainer_arguments(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Arguments of __init__ without self."""
    init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    arguments = init.args.args[1:]
    defaults = [None] * (len(arguments) - len(init.args.defaults)) + list(init.args.defaults)
    late = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    for argument, default in [*zip(arguments, defaults, strict=True), *late]:
        yield argument.arg, ast.unparse(default) if default is not None else ""


def dataclass_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Annotated fields, those of a dataclass."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if field.target.id.startswith("_") or "ClassVar" in ast.unparse(field.annotation):
                continue
            default = field.value
            if isinstance(default, ast.Call):
                keywords = {k.arg: k.value for k in default.keywords}
                default = keywords.get("default") or keywords.get("default_factory")
            yield field.target.id, ast.unparse(default) if default is not None else ""


def spans(history: dict[tuple[str, str], dict[str, str]]) -> dict[str, dict[str, dict[str, list[list[str]]]]]:
    """name -> owner -> `in`: [first, last] of each stretch of releases that has it; `defaults`: [since, text]."""
    names: dict[str, dict[str, dict[str, list[list[str]]]]] = {}
    for (name, owner), defaults in sorted(history.items()):
        versions = VERSIONS["transformers" if owner == "TrainingArguments" else "trl"]
        stretches: list[list[str]] = []
        changes: list[list[str]] = []
        for before, version in pairwise(["", *versions]):
            if version not in defaults:
                continue
            if before in defaults:
                stretches[-1][1] = version
            else:
                stretches.append([version, version])
            if not changes or changes[-1][1] != defaults[version]:
                changes.append([version, defaults[version]])
        names.setdefault(name, {})[owner] = {"in": stretches, "defaults": changes}
    return names


def compact(known: dict[str, object]) -> str:
    """JSON with a line a name, so that a new release shows as few changed lines."""
    names = known["names"]
    assert isinstance(names, dict)
    lines = [f" {json.dumps(name)}: {json.dumps(owners)}" for name, owners in names.items()]
    head = ",\n".join(f'"{name}": {json.dumps(known[name])}' for name in ("versions", "requires"))
    return "{" + head + ',\n"names": {\n' + ",\n".join(lines) + "\n}}\n"


def page(known: dict[str, object]) -> str:
    """Renders docs/trl-versions.md: names with an equivalent, then names that dpoeng does not need, by reason."""
    names = known["names"]
    assert isinstance(names, dict)
    lines = [
        "# Arguments of TRL's DPO and their names in dpoeng",
        "",
        "Look up a name of `DPOConfig`, `DPOTrainer`, `TrainingArguments`, `ModelConfig` or `ScriptArguments` here;",
        "dpoeng's error messages give the same answers. `python docs/make_trl_versions.py WHEELS` generates this page",
        "from the signatures in the wheels.",
        "",
        f"TRL releases read: {', '.join(TRL)}. Releases of transformers read: {', '.join(TRANSFORMERS)}.",
        "So a range may in fact end later, before the next release read.",
        "Releases without a class name are those of transformers' `TrainingArguments`.",
        "",
    ]
    needless: dict[str, list[str]] = {}
    for name in names:
        if (why := needless_reason(name)) is not None:
            needless.setdefault(why, []).append(name)
    wanted = [name for name in names if needless_reason(name) is None]
    trl = [name for name in wanted if set(names[name]) != {"TrainingArguments"}]
    for title, group in (("TRL", trl), ("transformers", [name for name in wanted if name not in trl])):
        lines += [f"## Names of {title}", "", "| name | releases | default | in dpoeng |", "|---|---|---|---|"]
        for name in group:
            owners = sorted(names[name].items(), key=lambda item: ORDER.index(item[0]))
            cells = (
                f"`{name}`",
                releases_of(names[name]),
                "; ".join(dict.fromkeys(text for _, entry in owners if (text := defaults_of(entry)))),
                answer_in_words(name),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += ["## Names that dpoeng does not need", "", "| why | names and their releases |", "|---|---|"]
    for why, group in needless.items():
        parts = [f"`{name}` ({releases_of(names[name])})" for name in group]
        lines.append(f"| {why} | {', '.join(parts)} |")
    return "\n".join(lines) + "\n"


def releases_of(owners: dict[str, dict[str, list[list[str]]]]) -> str:
    """`DPOConfig since 0.9.2; DPOTrainer to 0.12.0`; TrainingArguments alone is not named."""
    texts = {
        owner: ", ".join(
            stretch(first, last, VERSIONS["transformers" if owner == "TrainingArguments" else "trl"])
            for first, last in entry["in"]
        )
        for owner, entry in owners.items()
    }
    if list(texts) == ["TrainingArguments"]:
        return texts["TrainingArguments"]
    return "; ".join(f"{owner} {texts[owner]}" for owner in ORDER if owner in texts)


def defaults_of(entry: dict[str, list[list[str]]]) -> str:
    """`` `None`, `1024` from 0.14.0 ``."""
    return ", ".join(
        f"`{text}`" + (f" from {since}" if since != entry["in"][0][0] else "")
        for since, text in entry["defaults"]
        if text
    )


def needless_reason(name: str) -> str | None:
    """Why nothing is to be done for a name; None where there is something to do or a newer name to know."""
    from dpoeng.engine.config.fields import known_fields
    from dpoeng.engine.config.other_trainers import meaning

    known = meaning(name, fields=known_fields())
    return known.needless if known and not known.renamed else None


def answer_in_words(name: str) -> str:
    """The cell of a table: what a name of TRL or transformers is here."""
    from dpoeng.engine.config.fields import known_fields
    from dpoeng.engine.config.other_trainers import meaning

    found = meaning(name, fields=known_fields())
    assert found is not None, f"{name} has no meaning in foreign_names.yaml"
    was = f"now `{found.renamed[0]}` ({found.renamed[1]}); " if found.renamed else ""
    if found.field == name:
        return "the same name" + (f": {found.note}" if found.note else "")
    if found.field:
        return f"{was}`{found.field}`"
    return was + (found.instead or f"not needed: {found.needless}")


def stretch(first: str, last: str, versions: list[str]) -> str:
    """`0.9.2 to 0.25.0`, `since 0.29.0`, `to 0.12.0`."""
    if (first, last) == (versions[0], versions[-1]):
        return "all"
    if last == versions[-1]:
        return f"since {first}"
    if first == versions[0]:
        return f"to {last}"
    return first if first == last else f"{first} to {last}"


if __name__ == "__main__":
    main()
