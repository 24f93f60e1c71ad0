"""The Python functions: the same work as the commands, rows in memory, and a cache as a sequence and as tensors."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from dpoeng_testing import pair_rows, tree, write_jsonl

import dpoeng
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes.precompute import precompute_reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with pairs.jsonl, a cache of them made by the recipe, and a short run."""
    folder = tmp_path_factory.mktemp("python")
    file = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=folder / "refcache"))
    metrics: list[Any] = []
    summary = dpoeng.train(
        cache=folder / "refcache", output_dir=folder / "out", max_steps=3, eval_share=0.3, on_metrics=metrics.append
    )
    assert summary.steps == 3
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert any("eval_loss" in line for line in metrics)
    return folder


def test_a_cache_made_from_rows_in_memory_is_that_of_the_file(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    summary = dpoeng.precompute_reference(pair_rows(12), model=tiny_model, cache=tmp_path / "refcache")
    assert (summary.pairs, summary.computed) == (12, 12)
    assert summary.view.startswith("rows-")
    assert len(repr(summary)) < 3000, "a notebook shows it: no tokens in it"
    ours, files = View.open(tmp_path / "refcache"), View.open(made / "refcache")
    assert ours.spec.digest == files.spec.digest
    assert ours.keys().tobytes() == files.keys().tobytes()
    assert [ours.extra(i) for i in range(12)] == [files.extra(i) for i in range(12)]
    assert list(ours.meta["files"].values()) == list(files.meta["files"].values()), "the digest of the rows"
    assert tree(tmp_path / "refcache", "objects") == tree(made / "refcache", "objects")


def test_other_rows_never_take_the_place_of_rows_in_memory(tmp_path: Path, tiny_model: Path) -> None:
    for rows in (pair_rows(4), pair_rows(6)[2:], pair_rows(4)):
        dpoeng.precompute_reference(rows, model=tiny_model, cache=tmp_path / "refcache")
    with pytest.raises(dpoeng.UserError, match="several views") as caught:
        dpoeng.open_cache(tmp_path / "refcache")
    assert 'view="rows-' in str(caught.value)
    assert "--view rows-" in caught.value.text()


def test_rows_of_a_cache_are_a_sequence(made: Path) -> None:
    rows, view = dpoeng.open_cache(made / "refcache"), View.open(made / "refcache")
    assert len(rows) == len(view) == 12
    for i, row in enumerate(rows):
        assert row.prompt_ids.tolist() == view[i].ids.prompt_ids.tolist()
        assert row.chosen_logps is not None
        assert row.chosen_logps.tobytes() == view[i].chosen_logps.tobytes()
        assert row.chosen_sum == row.chosen_logps.sum(dtype=np.float64)
        assert not row.chosen_logps.flags.writeable
        assert row.extra == {k: v for k, v in pair_rows(12)[i].items() if k not in ("prompt", "chosen", "rejected")}
        assert (Path(row.source_file).name, row.source_row) == ("pairs.jsonl", i + 1)
    part = rows[8:2:-2]
    assert [row.source_row for row in part] == [9, 7, 5]
    assert part[-1].source_row == 5
    assert part[1:][0].source_row == 7
    with pytest.raises(IndexError, match="row 3 of 3"):
        part[3]


def test_a_table_has_every_column(made: Path) -> None:
    rows = dpoeng.open_cache(made / "refcache")
    table = rows[2:7].to_arrow()
    assert table.num_rows == 5
    assert table["prompt_ids"][1].as_py() == rows[3].prompt_ids.tolist()
    assert table["chosen_logps"][0].as_py() == pytest.approx(rows[2].chosen_logps)
    assert table["rejected_sum"].to_pylist() == [row.rejected_sum for row in rows[2:7]]
    assert table["negative_type"].to_pylist() == ["wrong", "evasive", "wrong", "evasive", "wrong"]
    assert table["confident"].type == pa.bool_()
    assert rows[:0].to_arrow().num_rows == 0


def test_your_columns_are_all_in_the_table(tmp_path: Path, tiny_model: Path) -> None:
    """One that has a name of ours, and one of mixed types, which Arrow has no column for."""
    rows = [{**row, "chosen_sum": i, "note": "a" if i else 7} for i, row in enumerate(pair_rows(3))]
    dpoeng.precompute_reference(rows, model=tiny_model, cache=tmp_path / "refcache")
    table = dpoeng.open_cache(tmp_path / "refcache").to_arrow()
    assert table["extra.chosen_sum"].to_pylist() == [0, 1, 2]
    assert table["chosen_sum"].type == pa.float64()
    assert table["note"].to_pylist() == ["7", '"a"', '"a"']


def maps(folder: Path) -> list[tuple[int, int, str]]:
    """(begin, end, permissions) of the memory in which this process has mapped a cache's objects."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder / "objects") in line:
            span, permissions, *_ = line.split()
            begin, end = (int(part, 16) for part in span.split("-"))
            found.append((begin, end, permissions))
    return found


def test_tensors_lie_in_the_mapped_file(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    dpoeng.precompute_reference(pair_rows(8), model=tiny_model, cache=tmp_path / "refcache")
    before = tree(tmp_path / "refcache")
    rows = dpoeng.open_cache(tmp_path / "refcache")
    data = rows[1:].to_torch()
    assert len(data) == 7
    items = [data[i] for i in range(7)]
    for row, item in zip(rows[1:], items, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_logps", "rejected_logps"):
            tensor, array = item[name], getattr(row, name)
            assert tensor.numpy().tobytes() == array.tobytes()
            assert tensor.dtype == (torch.float32 if "logps" in name else torch.int32)
            for address in (tensor.data_ptr(), array.__array_interface__["data"][0]):
                assert any(begin <= address < end for begin, end, _ in maps(tmp_path / "refcache")), name
        assert item["chosen_sum"] == row.chosen_sum
    # A tensor cannot be read-only, so its page is private: no write reaches the file or the other rows.
    items[0]["chosen_logps"].zero_()
    assert rows[1].chosen_logps is not None
    assert rows[1].chosen_logps.max() < 0
    del rows, data
    assert items[1]["prompt_ids"].sum() > 0, "a tensor keeps its map alive"
    assert tree(tmp_path / "refcache") == before


def test_a_dataset_goes_to_other_processes(made: Path) -> None:
    data = dpoeng.open_cache(made / "refcache").to_torch()
    assert data[0]["chosen_ids"].tolist() == pickle.loads(pickle.dumps(data))[0]["chosen_ids"].tolist()


def test_evaluation_and_answers_are_those_of_the_commands(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpoeng.cli.main import main

    def command(*words: str) -> Any:
        with pytest.raises(SystemExit):
            main(list(words))
        return json.loads(capsys.readouterr().out)

    monkeypatch.chdir(made)
    (made / "dpoeng.yaml").write_text("beta: 7.0\n")  # no function reads it
    found = dpoeng.evaluate("out")
    assert found.beta == 0.1
    (made / "dpoeng.yaml").unlink()
    assert json.loads(json.dumps(found.record())) == command("eval", "--adapter", "out", "--json")
    assert dpoeng.evaluate("out", pairs="all").evaluation.pairs == 12
    answers = dpoeng.compare("out", ["tell me"], max_new_tokens=4)
    assert [vars_of(one) for one in answers] == command(
        "compare", "out", "--prompt", "tell me", "--max-new-tokens", "4", "--json"
    )
    assert len(dpoeng.compare("out", count=2, max_new_tokens=2)) == 2


def vars_of(one: Any) -> dict[str, str]:
    return {name: getattr(one, name) for name in ("prompt", "before", "after")}


def test_check_names_fields(made: Path, tiny_model: Path) -> None:
    rows = pair_rows(6)
    report = dpoeng.check([*rows, rows[0], {**rows[1], "prompt": "why " * 200}], model=tiny_model, max_length=120,
                          eval_pairs=rows[2:3], max_reject_share=0.5)  # fmt: skip
    found = {finding.code: finding for finding in report.findings}
    assert found["duplicate"].examples == [("row 7", "as row 1")]
    assert found["eval-same-pair"].examples == [("row 3", "also row 1")]
    assert "max_length" in found["prompt-too-long"].remedy
    assert not any("--" in finding.remedy for finding in report.findings)
    assert dpoeng.check(made / "pairs.jsonl").pairs == 12
    assert dpoeng.check([made / "pairs.jsonl"]).pairs == 12


def test_plan_asks_what_the_command_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/memory checks the answer itself."""
    from dpoeng.engine.config.plan import PlanConfig

    monkeypatch.setattr("dpoeng.engine.recipes.plan.make_plan", lambda request: request)
    request: Any = dpoeng.plan(Path("models/tiny"), gpu="24gb,80gb", max_length=8, compare=False)
    assert request == PlanConfig(model="models/tiny", gpu=("24gb", "80gb"), max_length=8, compare=False)


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        (lambda: dpoeng.train(bta=0.1), "config-unknown", ["where:    bta", "write beta"]),  # type: ignore[call-arg]
        (lambda: dpoeng.train(beta=-1), "config-value", ["where:    beta", "greater than 0"]),
        (lambda: dpoeng.train(beta=-1, lora_r=0), "config-several", ["lora_r", "at least 1"]),
        (lambda: dpoeng.train(max_length=9), "config-unknown", ["precompute-ref"]),  # type: ignore[call-arg]
        (lambda: dpoeng.evaluate("out", lora_r=9), "config-unknown", ["not of evaluate"]),  # type: ignore[call-arg]
        (lambda: dpoeng.plan("m", gpuz=2), "config-unknown", ["write gpu"]),  # type: ignore[call-arg]
        (lambda: dpoeng.plan("m", fsdp=True), "config-value", ["add gpus=2 or more"]),
        (lambda: dpoeng.check({"prompt": ["p"]}), "data-unknown-kind", ["dict"]),
        (lambda: dpoeng.check([]), "data-empty", ["no rows"]),
        (lambda: dpoeng.open_cache("nowhere"), "cache-not-found", ["`dpoeng precompute-ref PAIRS --model MODEL"]),
    ],
)
def test_errors_name_fields(
    call: Any, code: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dpoeng.UserError) as caught:
        call()
    assert caught.value.code == code
    for words in says:
        assert words in str(caught.value)


def test_nothing_is_printed_and_notes_are_logged(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{("promt" if k == "prompt" else k): v for k, v in row.items()} for row in pair_rows(3)]
    with caplog.at_level(logging.INFO, "dpoeng"):
        dpoeng.precompute_reference(rows, model=tiny_model, cache=tmp_path / "refcache")
    assert capfd.readouterr() == ("", "")
    assert 'did you mean `prompt`? (columns={"prompt": "promt"})' in caplog.text
    dpoeng.precompute_reference(rows, model=tiny_model, cache=tmp_path / "refcache", progress=True)
    assert 'columns={"prompt": "promt"}' in capfd.readouterr().err


@pytest.mark.parametrize("trained", [False, True])
def test_token_logps_is_plain_pytorch_with_gradient(trained: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=trained)
    targets = torch.tensor([[1, 10, 3], [0, -100, 7]])
    logps = dpoeng.token_logps(hidden, weight, targets)
    plain = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps, torch.where(targets >= 0, plain, 0.0))
    inputs = (hidden, weight) if trained else (hidden,)
    assert torch.autograd.gradcheck(lambda *given: dpoeng.token_logps(given[0], (*given, weight)[1], targets), inputs)
    with pytest.raises(ValueError, match=r"\[2, 3, 8\]"):
        dpoeng.token_logps(hidden, weight, targets[:1])
