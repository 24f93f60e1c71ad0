"""Rows of several scored responses through both phases: stored, compared, cut, killed, evaluated, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import SENTENCES, pair_rows, resumes_to_the_same_bytes, write_jsonl
from rank_processes import ends, run_alone, start, train_command

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.exchange.responses import response_stats
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS
from dpoeng.cache.schema import ScoredGroup
from dpoeng.cache.selection.rules import Rules, choose
from dpoeng.cache.verify import verify
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import TrainSummary, train
from dpoeng.engine.training.rows import Rows


def ranked_rows(count: int, responses: int = 3) -> list[dict[str, Any]]:
    """Rows of three responses by turns in another order; of every fourth row two have equal scores."""
    rows = []
    for i in range(count):
        texts = [f" {SENTENCES[(i + k) % 3]} ({i}, {k})\nEND" for k in range(responses)]
        scores = [float((i + 2 * k) % responses) for k in range(responses)]
        if i % 4 == 3:
            scores[0] = scores[1]
        rows.append({"prompt": f"Instruction: point {i}.\nResponse:", "responses": texts, "scores": scores,
                     "topic": "ab"[i % 2]})  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Views `rows`, `even` (no equal scores), the latter as `pairs` too, and `plain` pairs."""
    folder = tmp_path_factory.mktemp("ranked")
    even = [row for row in ranked_rows(8) if len(set(row["scores"])) == 3]
    for name, rows, pairs in (
        ("rows", ranked_rows(10), None),
        ("even", even, None),
        ("as_pairs", even, "all"),
        ("plain", pair_rows(4), None),
    ):
        file = write_jsonl(folder / f"{name}.jsonl", rows)
        precompute_reference(
            PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=folder / "cache", ranked_pairs=pairs)
        )
    return folder / "cache"


def run(cache: Path, out: Path, **fields: Any) -> TrainSummary:
    values: dict[str, Any] = {"max_steps": 3, "learning_rate": 3e-3, "lora_r": 4, "save_steps": 1, "view": "rows"}
    return train(TrainConfig(cache=cache, output_dir=out, **{**values, "loss_type": ("plackett_luce",), **fields}))


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_response_is_stored_once_with_the_models_numbers(cache: Path, tiny_model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    view = View.open(cache, "rows", rows=ROW_KINDS)
    rows = Rows.all_of(view)
    assert (len(rows), len(view)) == (10, 20)  # three responses are two pairs, the last beside the first
    row = rows[4]
    assert isinstance(row, ScoredGroup)
    assert row.scores == tuple(ranked_rows(5)[4]["scores"])
    assert row.pairs[1].ids.rejected_ids.tolist() == row.pairs[0].ids.chosen_ids.tolist()
    assert view.extra(rows.indices[4])["topic"] == "a"
    assert view.source(rows.indices[4])[1] == 5
    sides = [row.pairs[0].ids.chosen_ids, row.pairs[0].ids.rejected_ids, row.pairs[1].ids.chosen_ids]
    for text, ids, logps in zip(ranked_rows(5)[4]["responses"], sides, row.logps, strict=True):
        assert tokenizer.decode(ids).removesuffix(tokenizer.eos_token) == text
        whole = torch.from_numpy(np.concatenate([row.ids.prompt_ids, ids]).astype(np.int64))
        with torch.inference_mode():
            own = model(whole[None]).logits[0, len(row.ids.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = own.gather(1, whole[len(row.ids.prompt_ids) :, None]).squeeze(1)
        assert logps.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert (cache / "FORMAT").read_bytes() == b"dpoeng-refcache 4\n"  # older readers would take them for pairs
    assert verify(cache, depth="all").ok
    with pytest.raises(CacheError, match="kind of rows"):
        View.open(cache, "rows")


def test_a_step_over_rows_is_the_step_over_their_pairs(tmp_path: Path, cache: Path) -> None:
    """Every row has as many pairs, so that both are the mean over all of them; here each response runs once."""
    fields: dict[str, Any] = {"eval_share": 0, "max_steps": 1, "loss_type": ("sigmoid", "sft"), "ld_alpha": 0.5}
    for view, size in (("even", 6), ("as_pairs", 18)):
        run(
            cache, tmp_path / view, view=view, per_device_train_batch_size=size, gradient_accumulation_steps=1, **fields
        )
    ours, theirs = (lines(tmp_path / view)[-1] for view in ("even", "as_pairs"))
    for name in ("loss", "grad_norm", "rewards/chosen", "logps/rejected", "kl/chosen"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(
    "loss",
    [
        ("plackett_luce",),
        ("lipo_lambda", "sft"),
        ("aot",),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (("beta_dpo",), ("listnet", "bco_pair"), ("hinge",))),
    ],
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path, cache: Path, loss: tuple[str, ...]) -> None:
    more = {"beta_dpo_keep": 0.7} if loss == ("beta_dpo",) else {}
    for size in (4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        run(cache, tmp_path / str(size), loss_type=loss, per_device_eval_batch_size=size, **cut, **more)
    whole = lines(tmp_path / "4")
    assert len({line["loss"] for line in whole if "loss" in line}) >= 2
    for line, expected in zip(lines(tmp_path / "1"), whole, strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_layouts_give_the_same_training(tmp_path: Path, cache: Path) -> None:
    for layout in ("shared", "separate"):
        run(cache, tmp_path / layout, layout=layout, loss_type=("plackett_luce", "hinge"), pairs_in_row="best")
    for line, expected in zip(lines(tmp_path / "separate"), lines(tmp_path / "shared"), strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "eval_rewards/margins"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"loss_type": ("aot", "listnet"), "lora_dropout": 0.2, "eval_share": 0,
                              "gradient_accumulation_steps": 2}  # fmt: skip
    # in the second pass of the second step
    resumes_to_the_same_bytes(lambda out: run(cache, out, **fields), tmp_path, monkeypatch, killed_at=7)


def test_learns_the_ranking_and_evaluates_rows(tmp_path: Path, cache: Path) -> None:
    summary = run(cache, tmp_path / "out", max_steps=20, eval_share=0, learning_rate=1e-2)
    assert summary.train_pairs == 10
    assert summary.last["loss"] < summary.first["loss"] - 0.02
    found = evaluate_trained(
        find_trained(tmp_path / "out"), TrainConfig(cache=cache, view="rows", loss_type=("plackett_luce",)), "all"
    ).evaluation
    assert (found.pairs, found.prompts) == (10, 10)
    assert found.metrics["rewards/margins"] > 0
    assert found.metrics["rewards/accuracies"] > 0.6  # share of a row's pairs in the right order
    assert found.metrics["rewards/top_accuracies"] > 0.5
    assert found.intervals["rewards/top_accuracies"][0] <= found.metrics["rewards/top_accuracies"]
    assert found.groups["topic"]["a"].pairs == 5
    # The length-controlled accuracy is over all pairs of all rows, in which chosen is the longer or the shorter one.
    assert 0.5 < found.metrics["rewards/accuracies_length_controlled"] <= 1
    low, high = found.intervals["rewards/accuracies_length_controlled"]
    assert low < found.metrics["rewards/accuracies_length_controlled"] <= high
    assert -1 <= found.metrics["rewards/margins_length_correlation"] <= 1


def test_a_rows_weight_counts(tmp_path: Path, cache: Path, tiny_model: Path) -> None:
    rows = [{**row, "w": float(i == 0)} for i, row in enumerate(ranked_rows(2))]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=tmp_path / "c"))
    for loss in (("plackett_luce",), ("hinge",)):
        summary = run(
            tmp_path / "c", tmp_path / loss[0], eval_share=0, pair_weight_column="w", loss_type=loss, beta=1.0
        )
        start = {"plackett_luce": np.log(6), "hinge": 1.0}[loss[0]]  # of a policy that equals its reference
        assert summary.first["loss"] == pytest.approx(start / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("view", "fields", "code"),
    [
        ("plain", {"loss_type": ("plackett_luce",)}, "loss-rows"),
        ("as_pairs", {"loss_type": ("soft_sigmoid",)}, "loss-rows"),
        ("rows", {"loss_type": ("kto",)}, "loss-rows"),
        ("plain", {"loss_type": ("sigmoid",), "pairs_in_row": "best"}, "config-value"),
        ("rows", {"loss_type": ("sigmoid",), "order": "easy_first", "order_by": "logp"}, "select-score"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, cache: Path, view: str, fields: Any, code: str) -> None:
    with pytest.raises(UserError) as caught:
        run(cache, tmp_path / "out", view=view, **fields)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["plackett_luce,soft_sigmoid", "aot,listnet"])
def test_two_processes_train_as_one(tmp_path: Path, cache: Path, loss: str) -> None:
    words = "--view rows --max-steps 3 --per-device-train-batch-size 1 --gradient-accumulation-steps 3 --lora-r 4"
    words += f" --learning-rate 3e-3 --eval-share 0.3 --loss-type {loss}"
    run_alone(train_command(cache, tmp_path / "one", *words.split()))
    (tmp_path / "two").mkdir()
    ranks = start([train_command(cache, tmp_path / "two", *words.split())] * 2, tmp_path / "two")
    assert [status for status, _, _ in ends(ranks)] == [0, 0]
    for line, expected in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("more", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "forward_kl"}])
def test_settings_made_for_pairs_are_refused_with_losses_of_lists(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="plackett_luce"):
        TrainConfig(loss_type=("plackett_luce",), **more)


def test_other_scores_are_another_run_and_no_other_numbers(tmp_path: Path, tiny_model: Path) -> None:
    rows = ranked_rows(4)
    for turned in (False, True):
        if turned:
            rows[0]["scores"] = rows[0]["scores"][::-1]
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        done = precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=tmp_path / "cache"))
        assert (done.rows, done.computed) == (4, 0 if turned else 8)
        if not turned:
            run(tmp_path / "cache", tmp_path / "out", max_steps=1, eval_share=0)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "cache", tmp_path / "out", max_steps=1, eval_share=0)
    assert "scores" in str(caught.value.found) + str(caught.value.where) + caught.value.message


def test_held_out_rows_may_stand_in_another_order(tmp_path: Path, tiny_model: Path) -> None:
    """A row is the same with its responses turned round: all of the evaluation is trained on."""
    for name, step in (("rows", 1), ("turned", -1)):
        rows = [
            {**row, "responses": row["responses"][::step], "scores": row["scores"][::step]} for row in ranked_rows(3)
        ]
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        run(tmp_path / "cache", tmp_path / "out", eval_view="turned")
    assert caught.value.code == "eval-trained-on"


def test_the_command_line_says_what_it_saw(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ranked_rows(9))
    with pytest.raises(SystemExit, match="0"):
        main(["precompute-ref", str(file), "--model", str(tiny_model), "--cache", str(tmp_path / "c")])
    said = capsys.readouterr().out
    assert "9 rows of 27 responses" in said
    assert "times fewer" in said
    train_words = f"train --cache {tmp_path / 'c'} --output-dir {tmp_path / 'o'} --loss-type listnet --max-steps 2"
    with pytest.raises(SystemExit, match="0"):
        main([*train_words.split(), "--score-scale", "0.5"])
    assert "rewards/top_accuracies" in capsys.readouterr().out


def test_other_programs_read_rows_of_every_kind(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    import dpoeng

    rows = dpoeng.open_responses(cache, "rows")
    assert (len(rows), len(rows[2:5]), repr(rows)) == (10, 3, "<10 ranked rows of view 'rows'>")
    row = rows[4]
    group = View.open(cache, "rows", rows=ROW_KINDS).row(8)
    assert isinstance(group, ScoredGroup)
    assert row.scores == group.scores
    assert [part.tolist() for part in row.logps or ()] == [part.tolist() for part in group.logps]
    assert row.sums[2] == pytest.approx(float(group.logps[2].sum(dtype=np.float64)))
    assert (row.extra["topic"], row.source_row) == ("a", 5)
    pair = dpoeng.open_responses(cache, "plain")[0]
    assert (len(pair.responses), pair.scores) == (2, ())
    with pytest.raises(CacheError, match="kind of rows") as caught:
        dpoeng.open_cache(cache, "rows")
    assert "open_responses" in str(caught.value.remedy)

    for ending in ("jsonl", "parquet"):
        file = tmp_path / f"out.{ending}"
        for _ in range(2):  # and again over what it wrote itself
            with pytest.raises(SystemExit, match="0"):
                main(["cache", "export", str(cache), str(file), "--view", "rows"])
        assert "10 rows written" in capsys.readouterr().out
        lines = (
            [json.loads(line) for line in file.read_text().splitlines()]
            if ending == "jsonl"
            else (pq.read_table(file).to_pylist())
        )
        assert lines[4]["scores"] == list(row.scores)
        assert lines[4]["response_ids"] == [part.tolist() for part in row.responses]
        assert lines[4]["ref_logps"] == pytest.approx(list(row.sums))
        assert lines[4]["source_row"] == 5


def test_stats_and_info_name_the_kind(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["cache", "stats", str(cache), "--view", "rows", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["rows"], found["responses"]) == ("ranked", 10, 30)
    right = total = 0
    view = View.open(cache, "rows", rows=ROW_KINDS)
    for row in (view.row(place) for place in view.row_starts()):
        assert isinstance(row, ScoredGroup)
        sums = [float(part.sum(dtype=np.float64)) for part in row.logps]
        pairs = [(a, b) for a in range(3) for b in range(3) if row.scores[a] > row.scores[b]]
        right, total = right + sum(sums[a] > sums[b] for a, b in pairs), total + len(pairs)
    assert found["accuracy"] == pytest.approx(right / total)
    with pytest.raises(SystemExit, match="0"):
        main(["cache", "stats", str(cache), "--view", "rows"])
    assert "10 ranked rows of 30 responses" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["cache", "info", str(cache)])
    said = capsys.readouterr().out
    assert "20 (two responses each; a row of the data is several)" in said


def test_a_view_whose_rows_do_not_fit_together_is_refused(tmp_path: Path, cache: Path) -> None:
    import shutil

    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    view, store = View.open(copy, "rows", rows=ROW_KINDS), Store.open(copy)
    for name, extra in (
        ("missing", {}),
        ("four", {"scores": [1.0, 2.0, 3.0, 4.0, 5.0]}),
        ("word", {"scores": ["a", 1]}),
    ):
        entries = [ViewEntry("f.jsonl", 1, view.key(i), extra if i == 0 else {}) for i in range(2)]
        store.write_view(view.spec.digest, name, entries, view.meta, known=store.lookup(view.spec.digest))
        for read in (lambda view: view.row(0), response_stats, lambda view: choose(view, Rules(by="spread"))):
            with pytest.raises(CacheError, match="damaged"):
                read(View.open(copy, name, rows=ROW_KINDS))
