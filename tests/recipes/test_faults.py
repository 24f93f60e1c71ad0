"""Faults in the engine: interruptions, cache hits and misses, the machine. See tests/faults.md."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import Disk
from dpoeng.cache.reader import View
from dpoeng.cache.records import canonical_json
from dpoeng.cache.schema import ScoredPair
from dpoeng.cache.spec import ReferenceSpec, diff_specs
from dpoeng.cache.store import Store
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes import precompute as precompute_module
from dpoeng.engine.recipes.precompute import PrecomputeSummary, default_view_name, precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference import drift as drift_module
from dpoeng.engine.reference import identity as identity_module
from dpoeng.engine.reference import identity as reference_module
from dpoeng.engine.reference.identity import reference_spec
from dpoeng.engine.reference.view import portable_name
from dpoeng.engine.runtime import folders
from dpoeng.engine.runtime.progress import NoProgress
from dpoeng.engine.runtime.stopping import keeping_signals
from dpoeng.engine.scoring import pairs as scoring_pairs
from dpoeng.engine.training import batch_loss as batch_module
from dpoeng.engine.training import loop as loop_module


class Notes(NoProgress):
    """Keeps what a run tells its user."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def precompute(
    pairs: Path, model: Path, cache: Path, progress: NoProgress | None = None, **fields: Any
) -> PrecomputeSummary:
    values: dict[str, Any] = {"shard_tokens": 300, "batch_tokens": 200, **fields}
    config = PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache, **values)
    return precompute_reference(config, progress or NoProgress())


def quick(cache: Path, out: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {"max_steps": 2, "eval_share": 0, "learning_rate": 1e-3, **fields}
    return TrainConfig(cache=cache, output_dir=out, **values)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flip_a_bit(path: Path) -> None:
    """The last byte of a safetensors file belongs to a weight."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def adapter(sft_adapter: Path) -> Path:
    """The adapter of the SFT model that is the reference here."""
    return sft_adapter


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A cache of 24 pairs that nothing disturbed; pairs.jsonl beside it. Tests leave it as it is, or copy it."""
    folder = tmp_path_factory.mktemp("whole")
    precompute(write_jsonl(folder / "pairs.jsonl", pair_rows(24)), tiny_model, folder / "cache")
    return folder / "cache"


# --------------------------------------------------------------------------- 45: stopped, then the same command


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command line in a separate folder -> (exit status, stderr). Signals are handled as in a terminal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits "ignore"
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: signal.Signals) -> None:
    """Sends this process a real signal in the middle of the work: when `owner.name` is called for the `call`th time."""
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def check_stopped(status: int, said: str, number: signal.Signals) -> None:
    assert status == 128 + number
    assert "run the same command again" in said.lower()
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("number", "owner", "name", "call"),
    [
        (signal.SIGINT, scoring_pairs, "score_pairs", 4),
        (signal.SIGTERM, scoring_pairs, "score_pairs", 7),
        (signal.SIGINT, Disk, "write", 5),
        (signal.SIGTERM, Disk, "link", 6),
        (signal.SIGUSR1, scoring_pairs, "score_pairs", 2),
    ],
)
def test_phase_one_stopped_continues_to_the_same_bytes(
    command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    tiny_model: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    owner: Any,
    name: str,
    call: int,
) -> None:
    """Fault 45."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    line = ("precompute-ref", "pairs.jsonl", "--model", tiny_model, "--shard-tokens", 300, "--batch-tokens", 200)
    with monkeypatch.context() as patched:
        signal_at(patched, owner, name, call, number)
        check_stopped(*command(*line), number)
    kept = tree(tmp_path / "refcache", "objects")
    expected = tree(whole, "objects")
    assert 0 < len(kept) < len(expected)
    assert list((tmp_path / "refcache" / "tmp").iterdir()) == []
    assert command(*line)[0] == 0
    assert tree(tmp_path / "refcache", "objects", "runs", "specs") == tree(whole, "objects", "runs", "specs")
    assert kept.items() <= expected.items()


def outcome(out: Path) -> dict[str, str]:
    """What two equal runs must have in common, byte for byte."""
    return {**tree(out, "adapter", "checkpoint-00000004"), "metrics": (out / "metrics.jsonl").read_text()}


TRAIN = (
    "--max-steps 4 --save-steps 1 --per-device-train-batch-size 2 --gradient-accumulation-steps 2 "
    "--learning-rate 0.001 --lora-dropout 0.1"
).split()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    settings = {TRAIN[i][2:].replace("-", "_"): TRAIN[i + 1] for i in range(0, len(TRAIN), 2)}
    train(load_config(TrainConfig, {**settings, "cache": whole, "output_dir": out}))
    return outcome(out)


@pytest.mark.parametrize(
    ("number", "owner", "name", "call"),
    [
        # Evaluation first: two batches; then two of the training in each step.
        (signal.SIGINT, batch_module, "batch_sums", 6),
        (signal.SIGTERM, batch_module, "batch_sums", 7),
        (signal.SIGTERM, folders, "write_durably", 5),
        (signal.SIGUSR1, batch_module, "batch_sums", 3),
        (signal.SIGINT, folders, "write_durably", 8),
    ],
)
def test_phase_two_stopped_continues_to_the_same_bytes(
    command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    whole: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    owner: Any,
    name: str,
    call: int,
) -> None:
    """Fault 45."""
    line = ("train", "--cache", whole, "--output-dir", "out", *TRAIN)
    with monkeypatch.context() as patched:
        signal_at(patched, owner, name, call, number)
        check_stopped(*command(*line), number)
    assert not (tmp_path / "out" / "adapter").exists()
    assert command(*line)[0] == 0
    assert outcome(tmp_path / "out") == undisturbed


def test_a_signal_waits_for_the_step_and_its_checkpoint(
    command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 45. Without it, a run whose checkpoints are far apart would lose all steps since the last."""
    line = ("train", "--cache", whole, "--output-dir", "out", *TRAIN, "--save-steps", 100)
    with monkeypatch.context() as patched:
        signal_at(patched, loop_module, "train_step", 2, signal.SIGUSR1)
        status, said = command(*line)
    check_stopped(status, said, signal.SIGUSR1)
    assert "received SIGUSR1: step 2 of 4 is done and saved in a checkpoint" in said
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-00000002"]
    status, said = command(*line)
    assert (status, "resuming from step 2 of 4" in said) == (0, True)


def test_the_same_signal_again_ends_at_once(
    command: Callable[..., tuple[int, str]], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("train", "--cache", whole, "--output-dir", "out", *TRAIN, "--save-steps", 100)
    signal_at(monkeypatch, batch_module, "batch_sums", 7, signal.SIGTERM)
    signal_at(monkeypatch, batch_module, "batch_sums", 7, signal.SIGTERM)  # the same call: two signals in one step
    check_stopped(*command(*line), signal.SIGTERM)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_work_continues_after_a_handler_that_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the user's may count signals; one that it ignores is left alone; other threads keep none."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with keeping_signals() as kept:
            signal.raise_signal(signal.SIGTERM)
            assert kept.number == 0
            signal.raise_signal(signal.SIGUSR1)
            assert (kept.number, seen) == (signal.SIGUSR1, [])
            kept.hand_on(kept.number)
            assert (kept.number, seen) == (0, [signal.SIGUSR1])
            signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1] * 2  # what is left over is not lost
        with ThreadPoolExecutor(1) as pool:
            pool.submit(keeping_signals().__enter__).result()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGTERM, ignored)


# --------------------------------------------------------------------------- 50, 54: every field of the identity

EIGHT: dict[str, Any] = {"quantization": "8bit", "batch_tokens": 100}
FOUR: dict[str, Any] = {"quantization": "4bit"}
Edit = Callable[[Path, Path], None]


def spec_of(model: Path, adapter: Path | None, **fields: Any) -> ReferenceSpec:
    source = find_adapter(str(adapter)) if adapter else None
    return reference_spec(PrecomputeConfig(**fields), find_model(str(model)), source)


MISSES: dict[str, tuple[dict[str, Any], dict[str, Any], Edit | None, set[str]]] = {
    # what changes: (settings before, settings after, edit of model and adapter on the disk, fields that must differ)
    "one bit of a weight": ({}, {}, lambda model, _: flip_a_bit(model / "model.safetensors"), {"weights"}),
    "a constant of the forward": (
        {},
        {},
        lambda model, _: edit_json(model / "config.json", rms_norm_eps=1e-4),
        {"config.rms_norm_eps"},
    ),
    "one bit of the adapter": (
        {},
        {},
        lambda _, adapter: flip_a_bit(adapter / "adapter_model.safetensors"),
        {"adapter.weights"},
    ),
    "lora_alpha alone": (
        {},
        {},
        lambda _, adapter: edit_json(adapter / "adapter_config.json", lora_alpha=9),
        {"adapter.config.lora_alpha"},
    ),
    "use_rslora alone": (
        {},
        {},
        lambda _, adapter: edit_json(adapter / "adapter_config.json", use_rslora=True),
        {"adapter.config.use_rslora"},
    ),
    "rank_pattern": (
        {},
        {},
        lambda _, adapter: edit_json(adapter / "adapter_config.json", alpha_pattern={"q_proj": 3}),
        {"adapter.config.alpha_pattern.q_proj"},
    ),
    "dtype": ({}, {"dtype": "bfloat16"}, None, {"dtype"}),
    "8bit": (
        {},
        {"quantization": "8bit"},
        None,
        {"quantization", "quantization.method", "quantization.skip", "quantization.activations"},
    ),
    "number format": (FOUR, {**FOUR, "bnb_4bit_quant_type": "fp4"}, None, {"quantization.method"}),
    "double quantisation": (FOUR, {**FOUR, "bnb_4bit_use_double_quant": False}, None, {"quantization.double_quant"}),
    "attention layout": ({}, {"layout": "separate"}, None, {"scoring.layout"}),
}


@pytest.mark.parametrize("name", MISSES)
def test_a_change_that_moves_a_number_misses(tmp_path: Path, tiny_model: Path, adapter: Path, name: str) -> None:
    """Faults 47, 50 and 54: the field that changed, and no other, makes another identity."""
    before, after, edit, fields = MISSES[name]
    model, lora = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copytree(adapter, tmp_path / "adapter")
    old = spec_of(model, lora, **before)
    if edit:
        edit(model, lora)
    new = spec_of(model, lora, **after)
    assert old.digest != new.digest
    assert {change.field for change in diff_specs(old, new)} == fields


def test_with_and_without_adapter_or_scoring_code_misses(
    tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = spec_of(tiny_model, None), spec_of(tiny_model, adapter)
    assert base.digest != tuned.digest
    monkeypatch.setattr(reference_module, "SCORING_VERSION", reference_module.SCORING_VERSION + 1)
    assert [change.field for change in diff_specs(base, spec_of(tiny_model, None))] == ["scoring.version"]


HITS: dict[str, tuple[dict[str, Any], dict[str, Any], Edit | None]] = {
    "batch plan": ({"batch_tokens": 100}, {"batch_tokens": 200}, None),
    "batch plan, 8bit": ({**EIGHT, "batch_tokens": 100}, {**EIGHT, "batch_tokens": 200}, None),
    "batch plan, 4bit": ({**FOUR, "batch_tokens": 100}, {**FOUR, "batch_tokens": 200}, None),
    "settings of a quantiser that is off": (
        {},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        None,
    ),
    "dtype spelled out": ({}, {"dtype": "float32"}, None),
    "what acts through token ids or not at all": (
        {},
        {
            "max_length": 64,
            "truncation_mode": "keep_end",
            "append_eos": False,
            "shard_tokens": 7,
            "cache": Path("elsewhere"),
            "name": "other",
            "device": "cpu",
            "where": "confident",
        },
        None,
    ),
    "settings of the tokenizer": (
        {},
        {},
        lambda model, _: edit_json(model / "tokenizer_config.json", model_max_length=7, padding_side="left"),
    ),
    "names and notes of the model": (
        {},
        {},
        lambda model, _: edit_json(
            model / "config.json", transformers_version="0.0.1", use_cache=False, _name_or_path="x", bos_token_id=3
        ),
    ),
    "names and notes of the adapter": (
        {},
        {},
        lambda _, adapter: edit_json(
            adapter / "adapter_config.json",
            lora_dropout=0.5,
            base_model_name_or_path="y",
            inference_mode=False,
            lora_alpha=8.0,
        ),
    ),
}


@pytest.mark.parametrize("name", HITS)
def test_a_change_that_moves_no_number_hits(tmp_path: Path, tiny_model: Path, adapter: Path, name: str) -> None:
    before, after, edit = HITS[name]
    model, lora = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copytree(adapter, tmp_path / "adapter")
    old = spec_of(model, lora, **before)
    if edit:
        edit(model, lora)
    assert diff_specs(old, spec_of(model, lora, **after)) == []


# --------------------------------------------------------------------------- 51 to 53: what acts through token ids


def chat(i: int, *, system: bool) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What of point {i}?"}]
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, *turns] if system else turns,
        "chosen": [{"role": "assistant", "content": f"Point {i} is red."}],
        "rejected": [{"role": "assistant", "content": f"I do not know {i}."}],
    }


def test_an_edited_template_recomputes_what_it_changed(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    """Fault 51: of text, chats, and chats with a system turn, only the last are rendered otherwise."""
    rows = [chat(i, system=i < 3) for i in range(8)]
    chats = write_jsonl(tmp_path / "chats.jsonl", rows)
    texts = write_jsonl(tmp_path / "texts.jsonl", pair_rows(5))
    for file in (chats, texts):
        precompute(file, tiny_model, tmp_path / "cache")
    before = View.open(tmp_path / "cache", "chats")

    edited = shutil.copytree(tiny_model, tmp_path / "edited")
    template = edited / "chat_template.jinja"
    assert "{{ m['role'] }}" in template.read_text()
    template.write_text(
        template.read_text().replace("{{ m['role'] }}", "{{ 'rules' if m['role'] == 'system' else m['role'] }}")
    )
    again = precompute(chats, edited, tmp_path / "cache")
    assert (again.computed, again.reused) == (3, 5)
    assert precompute(texts, edited, tmp_path / "cache").computed == 0
    after = View.open(tmp_path / "cache", "chats")
    assert [after.key(i) == before.key(i) for i in range(8)] == [False] * 3 + [True] * 5


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_max_length_recomputes_what_it_cuts(tmp_path: Path, tiny_model: Path, whole: Path, mode: str) -> None:
    """Fault 52: a pair that is not cut by either limit keeps its numbers."""
    cache = shutil.copytree(whole, tmp_path / "cache")
    file = whole.parent / "pairs.jsonl"
    ids = [View.open(cache)[i].ids for i in range(24)]
    longest = [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in ids]
    limit = sorted(longest)[14]
    cut = sum(length > limit for length in longest)
    assert 0 < cut < 24
    shorter = precompute(file, tiny_model, cache, max_length=limit, truncation_mode=mode)
    assert (shorter.computed, shorter.reused) == (cut, 24 - cut)
    fresh = precompute(file, tiny_model, tmp_path / "fresh", max_length=limit, truncation_mode=mode)
    assert fresh.computed == 24
    mixed, anew = View.open(cache), View.open(tmp_path / "fresh")
    for i in range(24):
        assert mixed.key(i) == anew.key(i)
        assert mixed[i].chosen_sum == pytest.approx(anew[i].chosen_sum, abs=1e-4)
    assert precompute(file, tiny_model, cache).computed == 0  # and back again


def test_a_tokenizer_that_was_used_before_hits(tmp_path: Path, tiny_model: Path, whole: Path) -> None:
    """Fault 53: padding and truncation of an earlier use stay in the object, and are saved with it."""
    from transformers import AutoTokenizer

    used = AutoTokenizer.from_pretrained(tiny_model)
    used(["The tide rises", "Bread"], padding="max_length", truncation=True, max_length=3)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    used.save_pretrained(model)
    state = json.loads((model / "tokenizer.json").read_text())
    assert state["truncation"]["max_length"] == 3
    assert state["padding"] is not None
    cache = shutil.copytree(whole, tmp_path / "cache")
    assert precompute(whole.parent / "pairs.jsonl", model, cache).computed == 0


# --------------------------------------------------------------------------- 55 to 58: what must hit


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was not to be called")


def test_settings_of_training_do_not_touch_phase_one(
    tmp_path: Path, tiny_model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults 55 and 56, with one file of settings for both phases, and a cache that was moved and renamed."""
    cache = shutil.copytree(whole, tmp_path / "elsewhere" / "renamed")
    rows = tree(cache, "objects", "runs", "specs")
    monkeypatch.setattr(precompute_module, "load_reference", never)
    settings = tmp_path / "settings.yaml"
    for change in (
        "learning_rate: 0.002",
        "beta: 0.5",
        "output_dir: another",
        "seed: 7",
        "lora_r: 4",
        "lora_alpha: 3\nnum_train_epochs: 1",
    ):
        settings.write_text(f"shard_tokens: 300\nbatch_tokens: 200\nmodel: {tiny_model}\ncache: {cache}\n{change}\n")
        pairs = {"pairs": (whole.parent / "pairs.jsonl",)}
        summary = precompute_reference(load_config(PrecomputeConfig, pairs, settings))
        assert (summary.computed, summary.reused) == (0, 24)
    assert tree(cache, "objects", "runs", "specs") == rows
    everything = tree(cache)
    for number, fields in enumerate(({"beta": 0.5, "seed": 7}, {"lora_r": 4, "learning_rate": 2e-3})):
        summary_two = train(quick(cache, tmp_path / f"out{number}", max_steps=1, **fields))
        assert summary_two.parity is not None
        assert summary_two.parity.mean_diff < 1e-5
    assert tree(cache) == everything


def test_reordered_and_ten_more(tmp_path: Path, tiny_model: Path) -> None:
    """Faults 57 and 58: order costs nothing, ten new pairs cost ten, and what was stored stays bit for bit."""
    rows = pair_rows(30)
    file = write_jsonl(tmp_path / "pairs.jsonl", rows[:20])
    precompute(file, tiny_model, tmp_path / "cache")
    objects = tree(tmp_path / "cache", "objects")
    first = View.open(tmp_path / "cache")
    known = {first.key(i): first[i].chosen_sum for i in range(20)}

    write_jsonl(file, rows[19::-1])
    assert precompute(file, tiny_model, tmp_path / "cache").computed == 0
    assert tree(tmp_path / "cache", "objects") == objects

    write_jsonl(file, [*rows[20:25], *rows[:20], *rows[25:]])
    more = precompute(file, tiny_model, tmp_path / "cache")
    assert (more.pairs, more.computed, more.reused) == (30, 10, 20)
    assert objects.items() < tree(tmp_path / "cache", "objects").items()
    view = View.open(tmp_path / "cache")
    assert {view.key(i): view[i].chosen_sum for i in range(5, 25)} == known


# --------------------------------------------------------------------------- 59, 60: the parity check stands behind


def without(field: str) -> Callable[..., ReferenceSpec]:
    """`reference_spec` as it would be, had somebody forgotten a field."""

    def forgetful(*args: Any, **kwargs: Any) -> ReferenceSpec:
        fields = reference_spec(*args, **kwargs).fields
        *path, last = field.split(".")
        inner = fields
        for name in path:
            inner = inner[name]
        inner[last] = None
        return ReferenceSpec.from_fields(fields)

    return forgetful


@pytest.mark.parametrize("field", ["weights", "config", "adapter", "adapter.weights", "adapter.config"])
def test_a_forgotten_field_is_refused_in_phase_two(
    tmp_path: Path, tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Fault 59: the stale hit happens, as it must without the field, and training refuses it."""
    model, lora = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copytree(adapter, tmp_path / "adapter")
    monkeypatch.setattr(identity_module, "reference_spec", without(field))
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12))
    precompute(file, model, tmp_path / "cache", adapter=str(lora))
    assert train(quick(tmp_path / "cache", tmp_path / "sound", max_steps=1)).parity is not None

    match field:
        case "weights":
            save_tiny_model(model, _tokenizer(model), seed=1)
        case "config":
            edit_json(model / "config.json", rms_norm_eps=0.1)
        case "adapter" | "adapter.config":
            edit_json(lora / "adapter_config.json", lora_alpha=9)
        case _:
            other = _scaled(lora / "adapter_model.safetensors", 1.1)
            (lora / "adapter_model.safetensors").write_bytes(other)
    stale = precompute(file, model, tmp_path / "cache", adapter=str(lora))
    assert (stale.computed, stale.reused) == (0, 12)
    with pytest.raises(UserError) as caught:
        train(quick(tmp_path / "cache", tmp_path / "out", max_steps=1))
    assert caught.value.code == "parity-failed"
    assert not (tmp_path / "out").exists()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _scaled(path: Path, factor: float) -> bytes:
    from safetensors.torch import load_file, save

    return save({name: tensor * factor for name, tensor in load_file(path).items()}, {"format": "pt"})


def test_an_adapter_left_on_while_scoring_is_refused(
    tmp_path: Path, tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 60: the cache says "base alone", its numbers are those of base + adapter."""
    real = precompute_module.load_reference

    def adapter_left_on(config: Any, source: Any, _: Any, *more: Any, **named: Any) -> Any:
        return real(config, source, find_adapter(str(adapter)), *more, **named)

    monkeypatch.setattr(precompute_module, "load_reference", adapter_left_on)
    precompute(write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12)), tiny_model, tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        train(quick(tmp_path / "cache", tmp_path / "out"))
    assert caught.value.code == "parity-failed"


# --------------------------------------------------------------------------- 79: a cache that cannot be written

_READ_ONLY: list[Path] = []


def _refuse_writes(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: Python calls it before every change of the file system, whoever asks for it, root or not."""
    if not _READ_ONLY:
        return
    match event:
        case "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            paths = [args[0]] if writes else []
        case "os.mkdir":
            paths = [] if Path(args[0]).is_dir() else [args[0]]  # the kernel says EEXIST first
        case "os.remove" | "os.rmdir" | "os.utime" | "os.chmod" | "os.truncate":
            paths = [args[0]]
        case "os.rename" | "os.link" | "os.symlink":
            paths = list(args[:2])
        case _:
            return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            absolute = Path(os.fsdecode(path)).absolute()
            if any(absolute.is_relative_to(root) for root in _READ_ONLY):
                raise OSError(errno.EROFS, "Read-only file system", str(absolute))


sys.addaudithook(_refuse_writes)


@contextlib.contextmanager
def read_only(root: Path) -> Iterator[None]:
    """Every change below `root` fails as on a file system that is mounted read-only."""
    before = tree(root)
    _READ_ONLY.append(root)
    try:
        for change in (
            lambda: (root / "new").write_text("x"),
            lambda: (root / "FORMAT").open("ab"),
            lambda: (root / "FORMAT").unlink(),
            lambda: (root / "new").mkdir(),
            lambda: (root / "FORMAT").rename(root / "F"),
            lambda: os.link(root / "FORMAT", root / "F"),
            lambda: os.utime(root / "FORMAT"),
        ):
            with pytest.raises(OSError, match="Read-only"):
                change()
        yield
    finally:
        _READ_ONLY.remove(root)
        assert tree(root) == before


@pytest.fixture
def with_rejects(tmp_path: Path, tiny_model: Path) -> Path:
    """A complete cache from a file of which one row was rejected."""
    rows = [*pair_rows(12), {"prompt": "p", "chosen": "same", "rejected": "same"}]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert precompute(file, tiny_model, tmp_path / "cache", max_reject_share=0.2).computed == 12
    return tmp_path / "cache"


def test_both_phases_read_a_read_only_cache(tmp_path: Path, tiny_model: Path, whole: Path) -> None:
    """Fault 79."""
    cache, notes = shutil.copytree(whole, tmp_path / "cache"), Notes()
    with read_only(cache):
        again = precompute(whole.parent / "pairs.jsonl", tiny_model, cache, notes)
        assert (again.computed, again.reused, again.rejects_file) == (0, 24, None)
        assert train(quick(cache, tmp_path / "out")).steps == 2
    assert notes.said == []


def test_a_read_only_cache_from_another_machine(
    tmp_path: Path, tiny_model: Path, with_rejects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 79: the record of the view would name this machine and this path now; that it cannot be is no reason to
    refuse."""
    monkeypatch.setattr(precompute_module, "device_name", lambda _: "another device")
    moved, notes = shutil.copytree(tiny_model, tmp_path / "moved"), Notes()
    with read_only(with_rejects):
        again = precompute(tmp_path / "pairs.jsonl", moved, with_rejects, notes, max_reject_share=0.2)
    assert (again.computed, again.reused) == (0, 12)
    assert again.rejects_file == with_rejects / "rejects" / "pairs.jsonl"
    assert len(notes.said) == 2
    assert all("read-only" in note for note in notes.said)


def test_missing_rows_in_a_read_only_cache_are_refused(tmp_path: Path, tiny_model: Path, whole: Path) -> None:
    """Fault 79: new pairs, another order of the pairs, or another view would have to be written."""
    cache = shutil.copytree(whole, tmp_path / "cache")
    rows = pair_rows(25)
    with read_only(cache):
        for changed, fields in ((rows, {}), (rows[23::-1], {}), (rows[:24], {"name": "other"})):
            file = write_jsonl(tmp_path / "pairs.jsonl", changed)
            with pytest.raises(UserError) as caught:
                precompute(file, tiny_model, cache, **fields)
            assert caught.value.code == "cache-read-only"
            assert caught.value.exit_status == 5


# --------------------------------------------------------------------------- 80 to 82: libraries and environment


def test_unusable_bitsandbytes_is_named(
    tmp_path: Path, tiny_model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 80, in both phases: what is missing and what to do, and nothing written but the empty cache."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as one:
        precompute(whole.parent / "pairs.jsonl", tiny_model, tmp_path / "cache", quantization="8bit")
    assert tree(tmp_path / "cache", "objects", "runs", "views") == {}
    with pytest.raises(UserError) as two:
        train(quick(whole, tmp_path / "out", quantization="4bit"))
    assert not (tmp_path / "out").exists()
    for caught, option in ((one, "8bit"), (two, "4bit")):
        assert caught.value.code == "bitsandbytes-unusable"
        assert caught.value.where == f"--quantization {option}"
        assert "pip install" in str(caught.value.remedy)
        assert caught.value.exit_status == 5


def old_versions() -> dict[str, str]:
    return {**precompute_module.library_versions(), "transformers": "5.0.0"}


def half_by_old_versions(tmp_path: Path, model: Path, **fields: Any) -> Path:
    """A cache of 12 pairs whose records name another transformers; the file then gets 12 more."""
    versions = old_versions()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(precompute_module, "library_versions", lambda: versions)
        file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12))
        precompute(file, model, tmp_path / "cache", **fields)
    write_jsonl(file, pair_rows(24))
    return file


def test_a_changed_library_is_checked_on_a_sample(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 81: the values agree; the run continues and reports it."""
    file, notes = half_by_old_versions(tmp_path, tiny_model), Notes()
    scored: list[int] = []
    real = scoring_pairs.score_pairs
    monkeypatch.setattr(scoring_pairs, "score_pairs", lambda lm, pairs: scored.append(len(pairs)) or real(lm, pairs))
    summary = precompute(file, tiny_model, tmp_path / "cache", notes)
    assert (summary.computed, summary.reused) == (12, 12)
    [said] = notes.said
    assert "transformers 5.0.0, now " in said
    assert "torch" not in said
    assert sum(scored) == summary.computed + drift_module.DRIFT_SAMPLE


def test_a_library_that_moved_the_numbers_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 81: a tenth of a nat a token is what a changed rotary embedding or mask does, and no rounding."""
    real = scoring_pairs.score_pairs

    def by_another_release(lm: Any, pairs: Any) -> list[ScoredPair]:
        return [ScoredPair(row.ids, row.chosen_logps - 0.1, row.rejected_logps - 0.1) for row in real(lm, pairs)]

    with monkeypatch.context() as patched:
        patched.setattr(scoring_pairs, "score_pairs", by_another_release)
        file = half_by_old_versions(tmp_path, tiny_model)
    objects = tree(tmp_path / "cache", "objects")
    with pytest.raises(UserError) as caught:
        precompute(file, tiny_model, tmp_path / "cache")
    assert caught.value.code == "reference-drifted"
    assert "transformers 5.0.0, now " in str(caught.value.where)
    assert "mean 0.1" in str(caught.value.found)
    assert tree(tmp_path / "cache", "objects") == objects


def test_the_same_libraries_cost_no_check(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another number of threads."""
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    precompute(file, tiny_model, tmp_path / "cache")
    write_jsonl(file, pair_rows(6))
    here = precompute_module.device_name(torch.device("cpu"))
    for module in (precompute_module, drift_module):
        monkeypatch.setattr(module, "device_name", lambda _: here.replace("1 thread)", "7 threads)"))
    monkeypatch.setattr(drift_module, "compare_with_cache", never)
    assert precompute(file, tiny_model, tmp_path / "cache").computed == 2
    assert "7 threads" in View.open(tmp_path / "cache").meta["device"]


def test_a_cache_knows_a_spec_by_its_bytes(whole: Path) -> None:
    """Fault 82: what is on the disk is the canonical spelling, whatever order a dict had."""
    store = Store.open(whole)
    [(digest, spec)] = store.specs().items()
    shuffled = dict(reversed(list(spec.fields.items())))
    assert canonical_json(shuffled) == spec.canonical
    assert ReferenceSpec.from_fields(shuffled).digest == digest


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/pairs.jsonl.gz", "pairs"),
        ("pairs.train.jsonl", "pairs.train"),
        ("pairs.test.jsonl", "pairs.test"),
        ("v1.2", "v1.2"),
    ],
)
def test_other_files_have_other_views(path: str, name: str) -> None:
    assert default_view_name(Path(path)) == name


def test_letters_that_have_no_place_in_a_views_name_still_tell_files_apart() -> None:
    names = {default_view_name(Path(path)) for path in ("训练.jsonl", "测试.jsonl", "a b.csv", "a-b.csv")}
    assert len(names) == 4


def test_a_view_of_other_pairs_is_not_replaced_without_a_word(tmp_path: Path, tiny_model: Path) -> None:
    notes = Notes()
    for folder in ("a", "b", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        pairs = write_jsonl(tmp_path / folder / "pairs.jsonl", pair_rows(3))
        precompute(pairs, tiny_model, tmp_path / "cache", notes)
    assert [text for text in notes.said if "view 'pairs' contained pairs of" in text] == [
        f"view 'pairs' contained pairs of {tmp_path / 'a' / 'pairs.jsonl'}; "
        "it now contains these pairs (--name keeps both)"
    ]


def test_the_weights_that_are_hashed_are_those_that_transformers_loads(tmp_path: Path, tiny_model: Path) -> None:
    """Of a folder with both, transformers takes model.safetensors and leaves the list of shards aside."""
    from transformers import AutoModelForCausalLM

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    for file in (tmp_path / "cut").glob("model*"):
        shutil.copy(file, model)
    assert (model / "model.safetensors.index.json").is_file()
    assert find_model(str(model)).weight_files == (model / "model.safetensors",)


def test_a_gguf_behind_a_link_is_found_again(tmp_path: Path) -> None:
    """The hub's cache links names to files that are called by their hash."""
    (tmp_path / "blob").write_bytes(b"GGUF")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blob")
    name = portable_name(find_model(str(tmp_path / "model.gguf")))
    assert find_model(name).gguf
