"""The project's own rules: which way imports point, and what must and must not exist in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("cli", "bench", "engine", "kernels", "cache")

# What each package may import of ours, and of others beside the standard library (None: anything).
OURS = {
    "cli": {"cli", "bench", "engine", "kernels", "cache"},
    "bench": {"bench", "engine", "kernels", "cache"},
    "engine": {"engine", "kernels", "cache"},
    "kernels": {"kernels"},
    "cache": {"cache"},
}
OTHERS: dict[str, set[str] | None] = {
    "cli": None,
    "bench": None,
    "engine": None,
    "kernels": {"torch", "triton"},
    "cache": {"pyarrow", "numpy", "xxhash", "gguf"},  # gguf only to find a file's tensors; it imports no torch
}
# The wings of `engine`, floor by floor: a module imports from lower floors and from its own wing only.
FLOORS = (
    {"recipes"},
    {"memory"},
    {"reference", "training"},
    {"scoring", "runs", "checks"},
    {"models", "migration"},
    {"config"},
    {"data", "runtime", "losses"},
)
# Libraries whose API changes often are met in one wing; bench compares with them, so it may.
MODEL_LIBRARIES = {"transformers", "peft", "bitsandbytes", "tokenizers", "huggingface_hub"}
# Beside it: the probes that `dpoeng doctor` runs, and the learning-rate schedules, which are transformers' own.
MODEL_PLACES = (
    "engine/models/", "engine/checks/probes.py", "engine/training/optimizer.py", "engine/data/hub.py",
    "engine/recipes/push.py",
)  # fmt: skip
FILES_IN_A_FOLDER = 20
LINES_IN_A_FUNCTION = 60


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, typing: bool = True) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in it the import stands.

    Without `typing`, what stands under `if TYPE_CHECKING:` and so never runs is left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "dpoeng":
                yield from ((node.lineno, f"dpoeng.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = []
    for path in sources(package):
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            allowed = OTHERS[package]
            if top == "dpoeng":
                fine = rest.split(".")[0] in OURS[package]
            elif top in PACKAGES:
                fine = False  # `from cache...` would load the module a second time under another name
            else:
                fine = top in sys.stdlib_module_names or allowed is None or top in allowed
            if not fine:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def wing_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and wing of everything of `dpoeng.engine` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dpoeng.engine"):
            continue
        parts = str(node.module).split(".")
        yield from ((node.lineno, wing) for wing in ([parts[2]] if parts[2:] else [a.name for a in node.names]))


def runs_up(wing: str, imported: str) -> bool:
    """Whether an import leaves its floor for the same one or a higher one."""
    floors = [{wing, imported} & floor for floor in FLOORS]
    return wing != imported and next(floor for floor in floors if floor) != {wing}


def test_wings_import_downwards_only() -> None:
    folders = {path.name for path in (ROOT / "engine").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set().union(*FLOORS)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for path in sources("engine")
        for line, imported in wing_imports(path)
        if path.parent.name in folders and runs_up(path.parent.name, imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_an_import_that_runs_up_is_found() -> None:
    assert runs_up("data", "config")
    assert runs_up("runs", "scoring")
    assert not runs_up("recipes", "data")
    assert not runs_up("data", "data")


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {f"dpoeng.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}": path
               for package in PACKAGES for path in sources(package)}  # fmt: skip
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                graph[name] |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)} & set(
                    modules
                )
    while free := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - free for name, needs in graph.items() if name not in free}
    assert not graph, f"in circles, or above one: {sorted(graph)}"


def test_folders_stay_small_and_say_what_they_know() -> None:
    for folder in {path.parent for package in PACKAGES for path in sources(package)}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert count <= FILES_IN_A_FOLDER, f"{folder.relative_to(ROOT)} holds {count} modules"
        if (folder / "__init__.py").is_file():
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


def folders_of_map(text: str) -> set[str]:
    """The folders that CONTRIBUTING's map names: each line begins with one, indented below its parent."""
    found, parents = set(), [""]
    for line in text.split("## Where things are")[1].split("```text\n")[1].split("```")[0].splitlines():
        match = re.match(r"^( *)(\S+)/ ", line)
        assert match, f"no folder in the map's line: {line}"
        depth = len(match[1]) // 2
        parents[depth + 1 :] = [f"{parents[depth]}{match[2]}/"]
        found.add(parents[depth + 1].rstrip("/"))
    return found


def test_contributing_names_every_folder_and_no_other() -> None:
    modules = {path for package in PACKAGES for path in sources(package)}  # new ones are not under version control yet
    files = {path.relative_to(ROOT) for path in {*tracked(), *modules}} | {Path("src/dpoeng/__init__.py")}
    folders = {parent.as_posix() for file in files for parent in file.parents} - {".", "src"}
    tests = {name for name in folders if name.startswith("tests/")}
    mirrors = {f"tests/{name}" for name in {*PACKAGES, *set().union(*FLOORS)}}
    own = {
        name for name in tests if any(name.startswith(f"{mirror}/") for mirror in mirrors)
    }  # what a wing's tests keep
    assert folders - mirrors - own == folders_of_map((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_a_folder_that_the_map_lacks_is_found() -> None:
    text = "## Where things are\n```text\na/   x\n  b/   y\nc/   z\n```\n"
    assert folders_of_map(text) == {"a", "a/b", "c"}


def test_functions_stay_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
        for package in PACKAGES
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LINES_IN_A_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_model_libraries_are_met_in_one_place() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in ("cli", "engine")
        for path in sources(package)
        for line, name in imports(path, typing=False)
        if name.split(".")[0] in MODEL_LIBRARIES and not path.relative_to(ROOT).as_posix().startswith(MODEL_PLACES)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_above_see_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "from dpoeng import cache\n"
        "def f():\n    import torch.nn\n    from peft import PeftModel\n"
        "if TYPE_CHECKING:\n    import transformers\n"
    )
    assert set(imports(file, typing=False)) == {(1, "dpoeng.cache"), (3, "torch.nn"), (4, "peft")}
    assert set(imports(file)) - set(imports(file, typing=False)) == {(6, "transformers")}


# Wings that need no torch, whose tests are to be collected without it; a tokenizer is what `data` is given.
WITHOUT_TORCH = {"cache": set(), "config": set(), "data": {"transformers", "tokenizers"}}


def files_of(module: str) -> list[Path]:
    """The file of a module of ours, or of one that tests share."""
    top, *parts = module.split(".")
    place = ROOT.joinpath(*parts) if top == "dpoeng" else ROOT / "tests" / "support" / top
    return [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]


def loaded_by(path: Path, seen: set[Path]) -> set[str]:
    """The libraries that importing a file loads: what it imports at its top, and what files of ours import there."""
    if path in seen:
        return set()
    seen.add(path)
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = [file for name in names for file in files_of(name)]
    return {name.split(".")[0] for name in names}.union(*(loaded_by(file, seen) for file in ours))


@pytest.mark.parametrize("wing", WITHOUT_TORCH)
def test_packages_without_torch_are_tested_without_it(wing: str) -> None:
    heavy = {"torch", *MODEL_LIBRARIES} - WITHOUT_TORCH[wing]
    files = [ROOT / "tests" / "conftest.py", *sorted((ROOT / "tests" / wing).glob("test_*.py"))]
    found = {str(file.relative_to(ROOT)): loads for file in files if (loads := loaded_by(file, set()) & heavy)}
    assert not found


def test_an_import_by_way_of_another_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("from rank_processes import start\nfrom dpoeng.engine.models import loading\n")
    assert {"pytest", "torch", "socket"} <= loaded_by(tmp_path / "test_a.py", set())


@pytest.mark.parametrize("folder", ["", "kernels", "tests"])
def test_these_folders_are_not_packages(folder: str) -> None:
    # With an __init__.py, `kernels` would hide the installed package of that name that transformers imports, for
    # anything that is run with the repository's root on sys.path.
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_the_installed_package_kernels_is_not_hidden() -> None:
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None or s.origin)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in shown


def test_every_package_is_found_and_typed() -> None:
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["where"] == ["src"]
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file(), package
        assert (ROOT / "src" / "dpoeng" / package).resolve() == ROOT / package


def pins_of(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """What `make test-oldest` installs is what pyproject.toml promises to work with."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gguf"]]
    bounds = {canonicalize_name(r.name): next(s.version for s in r.specifier if s.operator == ">=")
              for r in map(Requirement, wanted) if r.name != "triton"}  # fmt: skip  # torch's CUDA builds pin theirs
    found = pins_of("constraints-oldest.txt")
    assert found.keys() == bounds.keys()
    for name, version in found.items():
        assert Version(version) == Version(bounds[name]), name


def test_the_newest_versions_are_at_least_the_tested_ones() -> None:
    """What `make test-newest` installs lies within the ranges that pip accepts, at or above what is tested."""
    tested, newest = pins_of("constraints.txt"), pins_of("constraints-newest.txt")
    project = PROJECT["project"]
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    for name, version in newest.items():
        assert Version(version) >= Version(tested[name]), name
        assert name not in ranges or ranges[name].contains(version), name
    calls = {"transformers", "peft", "accelerate", "bitsandbytes", "triton"}
    assert calls <= newest.keys()


def test_triton_is_the_one_that_torch_asks_for() -> None:
    """torch's CUDA build names one version of triton, its CPU build none: a new torch needs a new line."""
    asked = {"2.13.0": "3.7.1"}
    pins = pins_of("constraints.txt")
    assert pins["triton"] == asked[pins["torch"]]


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = pins_of("constraints.txt")
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "dpoeng":
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
            assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


def tracked() -> list[Path]:
    """Files under version control that are text."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def test_nothing_names_somebodys_machine() -> None:
    # A path from a developer's disk or the address of a package index works for nobody else.
    folders = "|".join(("home", "root", "tmp", "work", "Users"))
    pattern = re.compile(rf"(?<![\w.~$}}/])/(?:{folders})/|pypi[.]org|pythonhosted|localhost:\d")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_page_of_requirements_is_that_of_the_project() -> None:
    page = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| (\S.*?) \|", page, flags=re.MULTILINE))
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    tested = dict(re.findall(r"^\| ([\w-]+) \| .*? \| (\S+) \|$", page, flags=re.MULTILINE))
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        shown = Requirement(requirement.name + rows[requirement.name].replace(" ", ""))
        assert shown.specifier == requirement.specifier
        pin = next(v for n, v in pins.items() if canonicalize_name(n) == canonicalize_name(requirement.name))
        assert tested[requirement.name] == pin
