"""What is installed: the same modules and data files by every way, nothing else, and a page that an index can show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import click
import pytest

from dpoeng.cli.main import dpoeng

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "dpoeng"
PACKAGES = ("bench", "cache", "cli", "engine", "kernels")
DATA = {
    "py.typed",
    *(f"{package}/py.typed" for package in PACKAGES),
    "cli/demo_pairs.jsonl",
    "cli/pages/page.css",
    "engine/config/foreign_names.yaml",
    "engine/config/trl_names.json",
    "engine/memory/known_models.jsonl",
    "engine/recipes/constraints.txt",
}
# PYTHONPATH may lead to this checkout's own dpoeng.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
BUILD = "from setuptools import build_meta; build_meta.build_{}('out')"


def package_files() -> set[str]:
    """Every file that an installed dpoeng has, by its name below the package; setuptools is not asked."""
    modules = {f"{package}/{path.relative_to(PACKAGE / package)}" for package in PACKAGES
               for path in (PACKAGE / package).rglob("*.py")}  # fmt: skip
    return {path.name for path in PACKAGE.glob("*.py")} | modules | DATA


def build(kind: str, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` of a tree with the setuptools of this environment; nothing is downloaded."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "out").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """Content of each file of the package in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("dpoeng/")]
        return {name.removeprefix("dpoeng/"): archive.read(name) for name in names}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what a used checkout has lying about."""
    folder = tmp_path_factory.mktemp("build") / "tree"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in (*PACKAGES, "src", "docs", "examples", "tests", ".ci"):
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(path, folder / path.name, symlinks=True, ignore=ignored)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    for name in ("cli", "engine/config", "tests"):
        (folder / name / "__pycache__").mkdir()
        for file in ("left.cpython-311.pyc", "left.py", "left.json"):
            (folder / name / "__pycache__" / file).touch()
    return folder


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return build("sdist", tree)


def test_wheels_of_the_tree_and_of_the_source_archive_hold_the_package_and_nothing_else(
    tree: Path, sdist: Path, tmp_path: Path
) -> None:
    direct = wheel_files(build("wheel", tree))
    assert set(direct) == package_files()
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        # Python has filters since 3.11.4, and warns without one since 3.12.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = tmp_path.iterdir()
    again = wheel_files(build("wheel", unpacked))
    assert again.keys() == direct.keys()
    assert [name for name in direct if direct[name] != again[name]] == []
    for name, data in direct.items():
        assert data == (PACKAGE / name).read_bytes(), name


def test_the_source_archive_has_documents_tests_and_pins(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [path for folder in ("docs", "examples") for path in (ROOT / folder).iterdir() if path.is_file()]
    wanted += [path for path in (ROOT / "tests").rglob("*") if path.is_file() and path.name != "test_rules.py"]
    wanted += [ROOT / f"constraints{name}.txt" for name in ("", "-oldest", "-newest")]
    wanted += [ROOT / name for name in ("CHANGELOG.md", "README.md")]
    wanted += (PACKAGE / "bench" / "results").iterdir()
    missing = {path.relative_to(ROOT).as_posix() for path in wanted if "__pycache__" not in path.parts} - names
    assert not missing
    assert not [name for name in names if re.search(r"__pycache__/.", name)]


def test_the_metadata_say_what_an_index_shows(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        info = next(member for member in archive if member.name.count("/") == 1 and member.name.endswith("PKG-INFO"))
        file = archive.extractfile(info)
        assert file is not None
        metadata = message_from_bytes(file.read())
    assert metadata["Name"] == "dpoeng"
    assert metadata["Author"] == "dpoeng contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# dpoeng")
    known = set(metadata.get_all("Classifier", []))
    assert {"Operating System :: POSIX :: Linux", "Environment :: GPU :: NVIDIA CUDA"} <= known


def test_the_page_on_an_index_has_no_link_that_ends_nowhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / project["readme"]).read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https://)[^)]*\)|<img|<a ", page) == []
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^dpoeng (.*)$", block, re.MULTILINE):
        words = line.split("#")[0].split()
        command = dpoeng.get_command(click.Context(dpoeng), words[0])
        assert command is not None, line
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.slow  # builds in separate environments, for which pip fetches setuptools
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", ["folder", "editable", "git", "sdist", "wheel"])
def test_every_way_to_install_gives_the_same_files(way: str, tree: Path, sdist: Path, tmp_path: Path) -> None:
    """With pip, in a separate environment that sees this one's libraries but not its dpoeng."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python.parents[1])], check=True)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n", encoding="utf-8")
    if way == "git":
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
        subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *who, "commit", "-q", "-m", "all"], cwd=tree, check=True)
    named = {
        "folder": [str(tree)],
        "editable": ["-e", str(tree)],
        "git": [f"git+file://{tree}"],
        "sdist": [str(sdist)],
        "wheel": [str(build("wheel", tree))],
    }[way]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *named]
    run(install, tmp_path)
    code = "import dpoeng; print(dpoeng.__path__[0])"
    shown = run([str(python), "-c", code], tmp_path)
    root = Path(shown.strip())
    assert root.is_relative_to(tree if way == "editable" else site)
    installed = [*root.iterdir(), *(path for package in PACKAGES for path in (root / package).rglob("*"))]
    found = {path.relative_to(root).as_posix() for path in installed if path.is_file()}
    aside = ["__pycache__/", *(["bench/results/"] if way == "editable" else [])]  # then it is the tree itself
    assert {name for name in found if not any(part in name for part in aside)} == package_files()
    assert "precompute-ref" in run([str(python.with_name("dpoeng")), "--help"], tmp_path)
    if way in ("editable", "wheel"):
        check_kernels(python, site, tree)


def run(command: list[str], folder: Path) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_kernels(python: Path, site: Path, tree: Path) -> None:
    """The libraries import from the project's own folder, without and with an installed package `kernels`."""
    code = (
        "import importlib.util as u, transformers.integrations.hub_kernels, bitsandbytes, dpoeng.kernels.token_logps; "
        "print(getattr(u.find_spec('kernels'), 'origin', None))"
    )
    command = [str(python), "-W", "ignore", "-c", code]
    assert run(command, tree).split()[-1] == "None"
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("", encoding="utf-8")
    assert run(command, tree).split()[-1] == str(site / "kernels" / "__init__.py")
