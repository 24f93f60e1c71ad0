"""What only a separate process can show: a real SIGKILL, a lock whose owner is gone, another seed and locale."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl
from processes import call_at, kill_myself, quietly, start_process

from dpoeng.cache.errors import UserError
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.lock import LOCK_FILE
from dpoeng.engine.training import loop as loop_module
from dpoeng.engine.training import step as step_module


def precompute(pairs: Path, model: Path, cache: Path) -> PrecomputeSummary:
    config = PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache, shard_tokens=300, batch_tokens=200)
    return precompute_reference(config)


def quick(cache: Path, out: Path, **fields: object) -> TrainConfig:
    values: dict[str, object] = {
        "max_steps": 6,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lora_dropout": 0.1,
        **fields,
    }
    return TrainConfig.model_validate({"cache": cache, "output_dir": out, **values})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows(24))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    precompute(pairs, tiny_model, folder)
    return folder


def outcome(out: Path) -> dict[str, str]:
    """What two equal runs must have in common, byte for byte."""
    return {**tree(out, "adapter", "checkpoint-00000006"), "metrics": (out / "metrics.jsonl").read_text()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train(quick(cache, out))
    return outcome(out)


# --------------------------------------------------------------------------- killed, then the same command again


def killed_in_phase_one(pairs: Path, model: Path, cache: Path, output: Path) -> None:
    quietly(output)
    call_at(Store, "commit_shard", 3, kill_myself)
    precompute(pairs, model, cache)


def test_phase_one_killed_continues_to_the_same_bytes(
    tmp_path: Path, tiny_model: Path, pairs: Path, cache: Path
) -> None:
    killed = start_process(killed_in_phase_one, pairs, tiny_model, tmp_path / "cache", tmp_path / "killed")
    killed.join(240)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "killed.err").read_text("utf-8")
    assert precompute(pairs, tiny_model, tmp_path / "cache").reused > 0
    parts = ("objects", "runs", "specs")
    assert tree(tmp_path / "cache", *parts) == tree(cache, *parts)


def killed_in_phase_two(cache: Path, out: Path, output: Path) -> None:
    quietly(output)
    call_at(step_module, "batch_loss", 10, kill_myself)
    train(quick(cache, out))


def test_phase_two_killed_continues_to_the_same_bytes(tmp_path: Path, cache: Path, undisturbed: dict[str, str]) -> None:
    killed = start_process(killed_in_phase_two, cache, tmp_path / "out", tmp_path / "killed")
    killed.join(240)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "killed.err").read_text("utf-8")
    assert train(quick(cache, tmp_path / "out")).resumed_from > 0
    assert outcome(tmp_path / "out") == undisturbed


def stopped_in_phase_one(folder: Path, model: Path) -> None:
    from dpoeng.cli.main import main

    quietly(folder / "stopped", folder)
    call_at(Store, "commit_shard", 1, lambda: os.kill(os.getpid(), signal.SIGTERM), after=True)
    try:
        main(["precompute-ref", "pairs.jsonl", "--model", str(model), "--shard-tokens", "300"])
    finally:
        sys.stderr.flush()


def test_sigterm_stops_and_prints_how_to_continue(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    stopped = start_process(stopped_in_phase_one, tmp_path, tiny_model)
    stopped.join(240)
    said = (tmp_path / "stopped.err").read_text("utf-8")
    assert stopped.exitcode == 128 + signal.SIGTERM, said
    assert "Run the same command again" in said
    assert len(list((tmp_path / "refcache" / "objects").rglob("*.arrow"))) == 1


# --------------------------------------------------------------------------- one run at a time in each folder


def waits_in_step_3(cache: Path, out: Path, there: Path) -> None:
    def wait() -> None:
        there.touch()
        time.sleep(600)

    quietly(there)
    call_at(loop_module, "train_step", 3, wait)
    train(quick(cache, out, max_steps=3))


def test_a_second_run_is_refused_and_a_killed_one_is_gone_on_with(cache: Path, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    first = start_process(waits_in_step_3, cache, out, there)
    try:
        limit = time.monotonic() + 240
        while not there.exists() and first.is_alive() and time.monotonic() < limit:
            time.sleep(0.05)
        assert first.is_alive(), there.with_suffix(".err").read_text("utf-8")
        before = tree(out)
        for fields in ({}, {"resume": False}, {"beta": 0.3}):
            with pytest.raises(UserError) as caught:
                train(quick(cache, out, max_steps=3, **fields))
            assert caught.value.code == "output-in-use"
            assert f"process {first.pid} on " in str(caught.value.found)
            assert tree(out) == before
    finally:
        first.kill()
        first.join()
    assert (out / LOCK_FILE).exists()  # nobody was left to remove it
    assert train(quick(cache, out, max_steps=3)).resumed_from == 2
    train(quick(cache, tmp_path / "alone", max_steps=3))
    assert tree(out, "adapter") == tree(tmp_path / "alone", "adapter")
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert not (out / LOCK_FILE).exists()


# --------------------------------------------------------------------------- another seed, locale, encoding, time zone


def identify(model: Path, adapter: Path, pairs: Path) -> list[str]:
    """The digest of a reference, and the keys of its pairs."""
    from dpoeng.cache.schema import pair_key
    from dpoeng.engine.data.pairs import read_pairs
    from dpoeng.engine.data.tokenization import tokenize_pairs
    from dpoeng.engine.models.sources import find_adapter, find_model
    from dpoeng.engine.models.tokenizer import load_tokenizer
    from dpoeng.engine.reference.identity import reference_spec

    source = find_model(str(model))
    data = tokenize_pairs(read_pairs([pairs]).pairs, load_tokenizer(source), max_length=64)
    spec = reference_spec(PrecomputeConfig(quantization="8bit"), source, find_adapter(str(adapter)))
    return [spec.digest, *(pair_key(pair.ids).hex() for pair in data.pairs)]


def identify_elsewhere(model: Path, adapter: Path, pairs: Path, output: Path) -> None:
    import locale

    import torch

    quietly(output)
    torch.set_num_threads(3)
    there = {
        "hash": hash("a text"),
        "encoding": locale.getpreferredencoding(),
        "hours": time.timezone / 3600,
        "identity": identify(model, adapter, pairs),
    }
    output.with_suffix(".json").write_text(json.dumps(there))


def test_identity_depends_on_no_environment(tmp_path: Path, tiny_model: Path, sft_adapter: Path) -> None:
    """Fault 82: hash seed, locale, encoding, time zone and threads, on text that is not ASCII."""
    rows = [*pair_rows(6), {"prompt": "Größe? İıß", "chosen": "尺寸 42\u2028", "rejected": "não sei \U0001f600"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    process = start_process(identify_elsewhere, tiny_model, sft_adapter, file, tmp_path / "there")
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "there.err").read_text("utf-8")
    there = json.loads((tmp_path / "there.json").read_text("utf-8"))
    # The environment really is another one.
    assert there["hash"] != hash("a text")
    assert there["encoding"].upper() in ("ASCII", "US-ASCII", "ANSI_X3.4-1968")
    assert there["hours"] == -5.75
    assert there["identity"] == identify(tiny_model, sft_adapter, file)
    assert len(there["identity"]) == 8
