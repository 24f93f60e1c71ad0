"""Nothing of the user's is written over: every option that names an output, on every kind of file that must survive."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.cli.pages.html import page, write_page
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs import folder, metrics
from dpoeng.engine.runtime.outputs import PAGE, RUN_FILES, refuse_output, scratch_folder

# The option that names an output, behind the command; {} is the victim.
COMMANDS = {
    "check": "check pairs.jsonl --html {}",
    "report": "report out --html {}",
    "export": "cache export refcache {}",
    "stats": "cache stats refcache --html {}",
    "plan": "plan --model MODEL --gpu 24gb --max-length 64 --html {}",
    "init": "init pairs.jsonl --output {}",
    "migrate": "migrate trl.yaml --output {}",
    "merge": "merge out --into {}",
    "quantize": "quantize MODEL --quantization 8bit --into {}",
    "bench page": "bench phases --pairs pairs.jsonl --html {}",
    "bench record": "bench phases --pairs pairs.jsonl --record {}",
    "bench trace": "bench phases --pairs pairs.jsonl --trace {trace}",
}
VICTIMS = ("pairs.jsonl", "notes.jsonl", "out/metrics.jsonl", "out/run.json", "refcache/FORMAT", "out/adapter/FILE")
FORCED = ("check", "report", "export", "stats", "plan", "init", "migrate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    pairs = write_jsonl(root / "pairs.jsonl", pair_rows(6))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=root / "refcache"))
    train(TrainConfig(cache=root / "refcache", output_dir=root / "out", max_steps=1, eval_share=0.0))
    (root / "notes.jsonl").write_text('{"mine": 1}\n')
    (root / "trl.yaml").write_text("beta: 0.2\nlearning_rate: 0.00001\nmax_length: 64\nloss_type: sigmoid\n")
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(line: str, model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(model) if word == "MODEL" else word for word in shlex.split(line)])
    said = capsys.readouterr().err
    assert stop.value.code in (2, 5), said
    return said


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_writes_over_what_is_not_its_own(
    made: Path, tiny_model: Path, command: str, victim: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(made)
    victim = victim.replace("FILE", "adapter_config.json")
    name = Path(victim)
    if command == "export" and name.suffix not in (".jsonl", ".parquet"):
        return  # refused for its ending
    trace = name
    if command == "bench trace":  # it writes NAME-training
        trace = made / "trace.json"
        shutil.copy(name, made / "trace-training.json")
    before = tree(made)
    line = COMMANDS[command].format(name, trace=trace)
    unread = {"notes.jsonl"} | ({"pairs.jsonl"} if command in ("plan", "migrate") else set())
    for force in ("", " --force") if command in FORCED and victim not in unread else ("",):
        said = refused(line + force, tiny_model, capsys)
        assert "[output-" in said or "[config-exists]" in said, said
    assert tree(made) == before


def test_a_file_gives_way_to_force_and_to_its_own_kind(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    for line in ("report out", "report out", "cache export refcache rows.jsonl", "cache export refcache rows.jsonl",
                 "cache export refcache rows.parquet", "cache export refcache rows.parquet",
                 "cache stats refcache --html s.html", "cache stats refcache --html s.html"):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line))
        assert stop.value.code == 0, capsys.readouterr().err
    (made / "other.html").write_text("<html>mine</html>")
    refused("report out --html other.html", made, capsys)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split("report out --html other.html --force"))
    assert stop.value.code == 0
    assert PAGE.made(made / "other.html")


def test_rules_of_one_file(tmp_path: Path) -> None:
    """Links are followed, devices and folders are left alone, and a missing parent is named."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(UserError, match="reads"):
        refuse_output(tmp_path / "link", PAGE, inputs=[mine], force=True)
    with pytest.raises(UserError, match="reads"):
        refuse_output(mine, PAGE, inputs=[tmp_path], force=True)
    for name, found in (
        (tmp_path, "a folder"),
        (Path("/dev/null"), "plain file"),
        (tmp_path / "a/b/c", f"{tmp_path}/a"),
    ):
        with pytest.raises(UserError) as error:
            refuse_output(name, PAGE, force=True)
        assert found in str(error.value.found)
    assert (tmp_path / "link").read_text() == "mine"


def test_a_studys_folder_is_its_own(tmp_path: Path) -> None:
    """Free, empty, or made by the same study; nothing else's, and no file's."""
    scratch_folder(tmp_path / "a" / "new", "quality")
    scratch_folder(tmp_path / "a" / "new", "quality")
    (tmp_path / "empty").mkdir()
    scratch_folder(tmp_path / "empty", "quality")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for taken, study in ((tmp_path / "a" / "new", "trunk"), (tmp_path / "mine", "quality"),
                         (tmp_path / "mine" / "notes.txt", "quality")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            scratch_folder(taken, study)
        assert caught.value.code == "output-exists"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_page_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    write_page(target, page("one", []))
    before = target.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_page(target, page("two", ["\ud800"]))
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_run_replaces_neither_its_models_nor_what_is_not_a_runs(made: Path, tmp_path: Path) -> None:
    for name in ("adapter/adapter_config.json", "model/config.json", "metrics.jsonl"):
        root = tmp_path / name.replace("/", "-")
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("{}")
        for resume in (None, False):
            with pytest.raises(UserError) as error:
                train(TrainConfig(cache=made / "refcache", output_dir=root, max_steps=1, eval_share=0.0, resume=resume))
            assert error.value.code == "output-foreign"
            assert (root / name).read_text() == "{}"


def test_a_run_does_not_train_over_its_own_adapter(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    cache = tmp_path / "cache"
    config = PrecomputeConfig(
        pairs=(made / "pairs.jsonl",), model=str(tiny_model), adapter=str(out / "adapter"), cache=cache
    )
    precompute_reference(config)
    before = tree(out)
    with pytest.raises(UserError) as error:
        train(TrainConfig(cache=cache, output_dir=out, max_steps=1, eval_share=0.0, resume=False))
    assert error.value.code == "output-protected"
    assert tree(out) == before


def test_checkpoints_of_transformers_stay(made: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "checkpoint-500"
    theirs.mkdir(parents=True)
    (theirs / "trainer_state.json").write_text("{}")
    train(TrainConfig(cache=made / "refcache", output_dir=tmp_path / "out", max_steps=1, eval_share=0.0))
    train(TrainConfig(cache=made / "refcache", output_dir=tmp_path / "out", max_steps=1, eval_share=0.0, resume=False))
    assert (theirs / "trainer_state.json").read_text() == "{}"


def test_the_demo_keeps_pairs_that_are_not_its_own(tmp_path: Path) -> None:
    from dpoeng.cli.demo import write_pairs

    file = write_pairs(tmp_path, 60)
    write_pairs(tmp_path, 60)
    file.write_text('{"mine": 1}\n')
    with pytest.raises(UserError):
        write_pairs(tmp_path, 60)
    assert json.loads(file.read_text()) == {"mine": 1}


def test_rejects_replace_only_rejects(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    """A file of pairs in the cache's folder of rejects, of the view's own name."""
    cache = shutil.copytree(made / "refcache", tmp_path / "refcache")
    (cache / "rejects").mkdir()
    pairs = write_jsonl(cache / "rejects" / "pairs.jsonl", pair_rows(6))
    before = pairs.read_bytes()
    with pytest.raises(UserError):
        precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=cache))
    assert pairs.read_bytes() == before


def test_the_names_in_a_runs_folder_are_known() -> None:
    named = {folder.RUN_FILE, folder.ADVICE_FILE, folder.SAMPLES_FILE, metrics.METRICS_FILE, metrics.TIMINGS_FILE}
    assert named | {metrics.EVALUATIONS_FILE, metrics.HELD_OUT_FILE, "sweep.json"} == RUN_FILES
