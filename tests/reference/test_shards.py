"""Phase one divided: pairs of one prompt together, one part a job, several processes at one cache."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import Rank, ends
from rank_processes import start as start_ranks

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, as_ids, as_keys, pair_key
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes import precompute as precompute_module
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.reference.shards import Part, plan_shards
from dpoeng.engine.scoring import pairs as scoring_pairs
from dpoeng.engine.scoring.layout import batches_of_pairs, pack, share_prompts, sides

PARTS = ("objects", "runs", "specs", "views")

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(as_ids)
some_pairs = st.lists(st.builds(PairIds, tokens, tokens, tokens), min_size=1, max_size=12)


# --------------------------------------------------------------------------- prompts shared across pairs


def test_negatives_of_one_prompt_by_hand() -> None:
    prompt, good, bad, worse = (as_ids(ids) for ids in ([7, 8], [1, 2], [3], [4, 5]))
    groups, branches = share_prompts([PairIds(prompt, good, bad), PairIds(prompt, good, worse)])
    assert pack(groups).input_ids.tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert branches.tolist() == [[0, 1], [0, 2]]


@given(some_pairs)
def test_every_pair_finds_its_own_branches(pairs: list[PairIds]) -> None:
    groups, branches = share_prompts(pairs)
    prompts = [group.prompt_ids.tobytes() for group in groups]
    assert len(set(prompts)) == len(prompts)
    flat = [(group, branch) for group in groups for branch in group.branches]
    assert len({(g.prompt_ids.tobytes(), b.ids.tobytes(), b.start) for g, b in flat}) == len(flat)
    for ids, own in zip(pairs, branches, strict=True):
        for (response, start), k in zip([(side.ids, side.start) for side in sides(ids)], own, strict=True):
            group, branch = flat[k]
            assert group.prompt_ids.tobytes() == ids.prompt_ids.tobytes()
            assert (branch.ids.tobytes(), branch.start) == (response.tobytes(), start)


@given(some_pairs, st.integers(1, 40))
def test_batches_hold_the_budget_and_count_what_is_computed(pairs: list[PairIds], budget: int) -> None:
    batches = batches_of_pairs(pairs, budget)
    assert [i for batch, _ in batches for i in batch] == list(range(len(pairs)))
    for batch, positions in batches:
        assert positions == len(pack(share_prompts([pairs[i] for i in batch])[0]).input_ids)
        assert positions <= budget or len(batch) == 1
    # No batch could have taken one more; or, where a prompt begins, not all of that prompt's pairs.
    for (batch, _), (after, _) in itertools.pairwise(batches):
        prompt, first = pairs[after[0]].prompt_ids.tobytes(), after[0]
        alike = itertools.takewhile(lambda i: pairs[i].prompt_ids.tobytes() == prompt, range(first, len(pairs)))  # noqa: B023
        more = [first] if pairs[batch[-1]].prompt_ids.tobytes() == prompt else list(alike)
        assert len(pack(share_prompts([pairs[i] for i in [*batch, *more]])[0]).input_ids) > budget


def test_a_batch_ends_between_two_prompts_where_it_can() -> None:
    pairs = [PairIds(as_ids([p]), as_ids([p, 1]), as_ids([p, 2 + n])) for p in (7, 8) for n in range(2)]
    assert batches_of_pairs(pairs, 13) == [(range(2), 7), (range(2, 4), 7)]  # a third pair would have fitted: 12
    assert batches_of_pairs(pairs, 6) == [(range(1), 5), (range(1, 2), 5), (range(2, 3), 5), (range(3, 4), 5)]


def _planned(fresh: dict[bytes, PairIds], budget: int) -> list[list[PairIds]]:
    pairs = list(fresh.values())
    return [[pairs[i] for i in shard] for shard in plan_shards(pairs, as_keys(fresh), budget)]


@given(some_pairs, st.integers(1, 40), st.randoms())
def test_the_plan_depends_on_the_set_alone(pairs: list[PairIds], budget: int, random: Any) -> None:
    fresh = {pair_key(ids): ids for ids in pairs}
    shuffled = list(fresh.items())
    random.shuffle(shuffled)
    plan = _planned(fresh, budget)
    assert [[pair_key(p) for p in s] for s in plan] == [
        [pair_key(p) for p in s] for s in _planned(dict(shuffled), budget)
    ]
    # and the order is: prompts by their longest pair (of equal ones by the smaller key), in each the longest pair first
    by_prompt: dict[bytes, list[tuple[int, bytes]]] = {}
    for key, ids in fresh.items():
        by_prompt.setdefault(ids.prompt_ids.tobytes(), []).append((-ids.total_tokens, key))
    wanted = [key for members in sorted(sorted(members) for members in by_prompt.values()) for _, key in members]
    assert [pair_key(ids) for shard in plan for ids in shard] == wanted
    assert sorted(pair_key(ids) for shard in plan for ids in shard) == sorted(fresh)
    order = [ids.prompt_ids.tobytes() for shard in plan for ids in shard]
    assert len(list(itertools.groupby(order))) == len(set(order))  # a prompt's pairs stand together


def test_several_negatives_a_prompt_are_run_once_and_give_the_same_numbers(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {**row, "rejected": f" No, not {word}.\nEND"}
        for row in pair_rows(4)
        for word in ("this", "that", "such a thing")
    ]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    computed: list[int] = []
    real = scoring_pairs.score_groups

    def counting(lm: Any, groups: Sequence[Any]) -> Any:
        computed.append(sum(group.total_tokens for group in groups))
        return real(lm, groups)

    monkeypatch.setattr(scoring_pairs, "score_groups", counting)
    precompute(file, tiny_model, tmp_path / "cache", batch_tokens=2000, shard_tokens=5000)
    view = View.open(tmp_path / "cache")
    each = [view[i] for i in range(len(view))]
    prompts = {row.ids.prompt_ids.tobytes(): len(row.ids.prompt_ids) for row in each}
    responses = {
        (row.ids.prompt_ids.tobytes(), ids.tobytes()): len(ids)
        for row in each
        for ids in [side.ids for side in sides(row.ids)]
    }
    assert sum(computed) == sum(prompts.values()) + sum(responses.values())
    assert sum(computed) < 0.6 * sum(row.ids.total_tokens for row in each)

    precompute(file, tiny_model, tmp_path / "alone", batch_tokens=1)  # every pair in a separate forward
    alone = View.open(tmp_path / "alone")
    for i, row in enumerate(each):
        np.testing.assert_allclose(row.chosen_logps, alone[i].chosen_logps, atol=2e-5)
        np.testing.assert_allclose(row.rejected_logps, alone[i].rejected_logps, atol=2e-5)


# --------------------------------------------------------------------------- parts


def precompute(file: Path, model: Path, cache: Path, **fields: Any) -> PrecomputeSummary:
    values: dict[str, Any] = {"shard_tokens": 300, "batch_tokens": 200, **fields}
    return precompute_reference(PrecomputeConfig(pairs=(file,), model=str(model), cache=cache, **values))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows(24))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, file: Path) -> Path:
    """The cache of one process that was left alone."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    precompute(file, tiny_model, cache)
    return cache


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_three_jobs_leave_the_bytes_of_one(
    tmp_path: Path, tiny_model: Path, file: Path, whole: Path, order: tuple[int, ...]
) -> None:
    """Fault 63: another number of processes; the job that ends last writes manifest and view."""
    cache = tmp_path / "cache"
    pending = []
    for index in order:
        assert not (cache / "views" / "pairs.json").exists()
        pending.append(precompute(file, tiny_model, cache, shard=f"{index}/3").pending)
    assert pending[0] > pending[1] > pending[2] == 0
    assert tree(cache, *PARTS) == tree(whole, *PARTS)


def test_a_part_whose_job_died_is_done_by_whoever_comes(
    tmp_path: Path, tiny_model: Path, file: Path, whole: Path
) -> None:
    """Fault 65: nobody holds a claim on a part, so none can go stale; and fault 64, the same part twice."""
    cache = tmp_path / "cache"
    precompute(file, tiny_model, cache, shard="1/3")
    again = precompute(file, tiny_model, cache, shard="1/3")
    assert again.computed == 0
    rest = precompute(file, tiny_model, cache)  # parts 2 and 3 never came
    assert rest.pending == 0
    assert 0 < rest.computed < 24
    assert tree(cache, *PARTS) == tree(whole, *PARTS)


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "1/0", "-1/4", "1/4/2"])
def test_an_invalid_shard_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="needs a part of the work") as caught:
        Part.parse(text)
    assert caught.value.where == "--shard"


def test_parts_cover_everything_once() -> None:
    items = list(range(11))
    assert sorted(itertools.chain.from_iterable(Part(i, 4).of(items) for i in range(1, 5))) == items


# --------------------------------------------------------------------------- processes started together


def killed_at_the_third_batch() -> None:
    real, calls = scoring_pairs.score_pairs, []

    def score_pairs(lm: Any, pairs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(lm, pairs)

    scoring_pairs.score_pairs = score_pairs  # type: ignore[assignment]


def raises_while_loading() -> None:
    def load_reference(*_: Any) -> None:
        raise RuntimeError("no such thing")

    precompute_module.load_reference = load_reference  # type: ignore[attr-defined]


def start(files: Sequence[Path], model: Path, cache: Path, *, last: Callable[[], None] | None = None) -> list[Rank]:
    """A process for each file."""
    line = ["--model", str(model), "--cache", str(cache), "--shard-tokens", "300", "--batch-tokens", "200"]
    return start_ranks([["precompute-ref", str(file), *line] for file in files], cache.parent, last=last)


def test_two_ranks_leave_the_bytes_of_one_and_one_of_them_reports(
    tmp_path: Path, tiny_model: Path, file: Path, whole: Path
) -> None:
    """Fault 63, as torchrun starts it."""
    ranks = start([file, file], tiny_model, tmp_path / "cache")
    (first, out, err), (second, other_out, other_err) = ends(ranks)
    assert (first, second) == (0, 0), err + other_err
    assert "24 in view 'pairs'" in out
    assert other_out == ""
    assert tree(tmp_path / "cache", *PARTS) == tree(whole, *PARTS)


def test_ranks_with_different_data_are_refused(tmp_path: Path, tiny_model: Path, file: Path) -> None:
    """Fault 66."""
    other = write_jsonl(tmp_path / "other.jsonl", pair_rows(23))
    for status, _, err in ends(start([file, other], tiny_model, tmp_path / "cache")):
        assert status == 2
        assert "different pairs" in err
        assert "Traceback" not in err
    assert not list((tmp_path / "cache" / "objects").rglob("*.arrow"))


@pytest.mark.parametrize(("last", "status"), [(killed_at_the_third_batch, -signal.SIGKILL), (raises_while_loading, 1)])
def test_a_rank_that_ends_ends_the_others(
    tmp_path: Path, tiny_model: Path, file: Path, whole: Path, last: Callable[[], None], status: int
) -> None:
    """Faults 61 and 68: within 60 s, with a message; the same command again gives the same bytes."""
    first, second = start([file, file], tiny_model, tmp_path / "cache", last=last)
    assert second.end()[0] == status
    code, _, err = first.end(within_s=60)
    assert code == 5
    assert "another process of this run ended" in err
    assert "Traceback" not in err
    assert not (tmp_path / "cache" / "views" / "pairs.json").exists()
    assert [status for status, _, _ in ends(start([file, file], tiny_model, tmp_path / "cache"))] == [0, 0]
    assert tree(tmp_path / "cache", *PARTS) == tree(whole, *PARTS)


def test_rows_that_appear_late_are_waited_for(
    tmp_path: Path, tiny_model: Path, file: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 67: a network file system shows other machines' files late."""
    cache = tmp_path / "cache"
    for index in (2, 3):
        precompute(file, tiny_model, cache, shard=f"{index}/3")
    store = Store.open(cache)
    (spec,) = store.spec_digests()
    pairs = [row.ids for row in map(View.open(whole).__getitem__, range(24))]
    before = store.lookup(spec)
    precompute(file, tiny_model, cache)
    answers = [before, before]
    real = Store.lookup

    def late(self: Store, *arguments: Any, **named: Any) -> Any:
        return answers.pop() if answers else real(self, *arguments, **named)

    monkeypatch.setattr(Store, "lookup", late)
    found, lacking = precompute_module._look_again(store, spec, before, pairs, patience_s=30)
    assert lacking == 0
    assert all(ids in found for ids in pairs)
    answers[:] = [before] * 1000
    given_up, lacking = precompute_module._look_again(store, spec, before, pairs, patience_s=0.2)
    assert lacking == sum(ids not in given_up for ids in pairs) > 0
