"""Remedies that are commands: what an error advises is run, and the command that failed then works."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train

SCORE = "precompute-ref pairs.jsonl --model model"
TRAIN = "train --max-steps 2"
Break = Callable[[], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with pairs, a model, a cache of them and a finished run."""
    folder = tmp_path_factory.mktemp("remedies")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    (folder / "model").symlink_to(tiny_model)
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "refcache"))
    train(TrainConfig(cache=folder / "refcache", output_dir=folder / "out", max_steps=2))
    return folder


@pytest.fixture
def call(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """Runs a command line of dpoeng in a copy of that folder -> (exit status, stderr)."""
    shutil.copytree(whole, tmp_path / "desk", symlinks=True)
    monkeypatch.chdir(tmp_path / "desk")

    def run(line: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line))
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


def one_object() -> Path:
    return next(Path("refcache/objects").rglob("*.arrow"))


def fill_the_page() -> None:
    Path("page.html").write_text("mine")


def damage_an_object() -> None:
    path = one_object()
    path.chmod(0o644)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(body)


# What is broken; what fails then; what its remedy says, as it is to be found there; what that means as a command.
CASES: dict[str, tuple[Break, str, str, str]] = {
    "no cache": (
        lambda: shutil.rmtree("refcache"),
        TRAIN,
        "`dpoeng precompute-ref PAIRS --model MODEL --cache FOLDER`",
        f"{SCORE} --cache refcache",
    ),
    "an object is gone": (lambda: one_object().unlink(), TRAIN + " --output-dir new", "`dpoeng precompute-ref`", SCORE),
    "another run": (lambda: None, TRAIN + " --beta 0.3", "--no-resume", TRAIN + " --beta 0.3 --no-resume"),
    "a page that is not ours": (
        fill_the_page,
        "report out --html page.html",
        "--force",
        "report out --html page.html --force",
    ),
    "a damaged object": (
        damage_an_object,
        TRAIN + " --output-dir new",
        "`dpoeng precompute-ref`",
        SCORE,
    ),
    "the rows of a view are not stored": (
        lambda: None,
        TRAIN + " --trunk-layer 1 --train-last-layers 1 --output-dir new",
        "--trunk-layer 1",
        SCORE + " --trunk-layer 1",
    ),
    "no cache to compare with": (
        lambda: None,
        "cache diff refcache elsewhere",
        "precompute-ref",
        SCORE + " --cache elsewhere",
    ),
    "a damaged run.json": (
        lambda: Path("out/run.json").write_text("{"),  # type: ignore[func-returns-value]
        "report out",
        "in this one with --no-resume",
        TRAIN + " --no-resume",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_remedy_that_is_a_command_mends_it(case: str, call: Callable[[str], tuple[int, str]]) -> None:
    damage, fails, words, remedy = CASES[case]
    damage()
    status, said = call(fails)
    assert status != 0
    assert words in re.sub(r"\s+", " ", said[said.index("remedy:") :])
    status, said = call(remedy)
    assert status == 0, said
    status, said = call(fails)
    assert status == 0, said


def test_the_line_of_a_damaged_format_is_put_back_by_its_remedy(call: Callable[[str], tuple[int, str]]) -> None:
    Path("refcache/FORMAT").write_text("garbage")
    status, said = call("cache info refcache")
    assert status != 0
    command = re.search(r"echo [^\n]+", said)
    assert command is not None, said
    subprocess.run(["bash", "-c", command[0]], check=True)
    assert call("cache info refcache")[0] == 0


# What fails; what its remedy says; the commands that it means, which work; what works then.
CHAINS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "two caches with one name for other pairs": (
        "cache merge refcache other",
        "with another --name and a new --cache",
        ("precompute-ref other.jsonl --model model --cache third --name other",),
        "cache merge refcache third",
    ),
    "a field that does not exist": (
        "train --config wrong.yaml",
        "`dpoeng config show`",
        ("config show",),
        TRAIN + " --beta 0.1",
    ),
    "too many pairs left out": (
        "precompute-ref long.jsonl --model model --max-length 6 --cache short",
        "`dpoeng check",
        ("check long.jsonl --model model",),
        "precompute-ref long.jsonl --model model --max-length 1024 --cache short",
    ),
    "a view of a name that is not there": (
        TRAIN + " --view other",
        "name one of these: pairs",
        ("cache info refcache",),
        TRAIN + " --view pairs --output-dir new",
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_commands_that_a_remedy_names_lead_on(case: str, call: Callable[[str], tuple[int, str]]) -> None:
    write_jsonl(Path("long.jsonl"), pair_rows(12))
    write_jsonl(Path("other.jsonl"), pair_rows(20)[12:])
    assert call("precompute-ref other.jsonl --model model --cache other --name pairs")[0] == 0
    Path("wrong.yaml").write_text("zzz: 0.2\nyyy: 1\n")
    fails, words, remedies, works = CHAINS[case]
    status, said = call(fails)
    assert status != 0
    assert words in re.sub(r"\s+", " ", said[said.index("remedy:") :])
    for line in (*remedies, works):
        status, said = call(line)
        assert status == 0, said
