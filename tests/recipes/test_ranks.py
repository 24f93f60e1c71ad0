"""Phase two in several processes: the adapter of one, whoever writes it, however a process ends."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl
from processes import start_process
from rank_processes import Rank, ends, run_alone, start, train_command, variables_of
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from dpoeng.bench.measuring.allocator import trace_allocator
from dpoeng.cache.reader import View
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.memory.simulate import Pair, Setup, trace_step
from dpoeng.engine.models.fsdp import layer_sharding, loads_whole_because
from dpoeng.engine.models.fsdp_loading import whole_because
from dpoeng.engine.models.layers.store import LayerStore
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import decoder_layers
from dpoeng.engine.models.quantized import holds_8_bits, quantized_layers
from dpoeng.engine.models.sources import ModelSource, find_adapter, find_model
from dpoeng.engine.recipes import policy as policy_module
from dpoeng.engine.recipes.inputs import split
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.runtime.distributed import Group, process_group
from dpoeng.engine.training import batch_loss as batch_module
from dpoeng.engine.training import loop as loop_module
from dpoeng.engine.training.order import plan_schedule

# Three forwards a step, which two processes and four cannot share evenly; dropout, which must not depend on who draws
# it; an epoch of three steps, whose last is smaller; evaluations that decide which adapter is saved.
SETTINGS = (
    "--max-steps 4 --save-steps 1 --parity-pairs 2 --per-device-train-batch-size 2 --gradient-accumulation-steps 3 "
    "--learning-rate 1e-3 --lora-dropout 0.1 --lora-r 4 --eval-share 0.2 --eval-steps 2 "
    "--per-device-eval-batch-size 2 --load-best-model-at-end --gradient-checkpointing"
).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(20))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def command(cache: Path, out: Path, *more: str) -> list[str]:
    return train_command(cache, out, *SETTINGS, *more)


def alone(cache: Path, out: Path, *more: str) -> Path:
    run_alone(command(cache, out, *more))
    return out


def together(size: int, cache: Path, out: Path, *more: str, last: Callable[[], None] | None = None) -> list[Rank]:
    out.mkdir(parents=True, exist_ok=True)
    return start([command(cache, out, *more)] * size, out, last=last)


def finished(ranks: list[Rank], out: Path) -> Path:
    found = ends(ranks)
    assert [status for status, _, _ in found] == [0] * len(ranks), "\n".join(err for _, _, err in found)
    assert "The adapter is in" in found[0][1]
    assert [out for _, out, _ in found[1:]] == [""] * (len(ranks) - 1)
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run of one process."""
    return alone(cache, tmp_path_factory.mktemp("one") / "out")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The same in two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    return finished(together(2, cache, out), out)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same(out: Path, expected: Path) -> None:
    """The same adapter to 1e-5, where training has moved its weights by 1e-3 and more; and the same figures."""
    found, wanted = adapter(out), adapter(expected)
    assert found.keys() == wanted.keys()
    moved = max(float(wanted[name].abs().max()) for name in wanted if "lora_B" in name)  # zero at the start
    assert moved > 1e-3
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=0)
    for line, other in zip(lines(out), lines(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    # Before the first step nothing has been added up over processes: a pair's numbers are the same bits.
    assert lines(out)[0] == lines(expected)[0]


def outcome(out: Path) -> dict[str, str]:
    return tree(out, "adapter", "checkpoint-00000004") | {"metrics": (out / "metrics.jsonl").read_text()}


def test_shares_cover_everything_once() -> None:
    for size, count in itertools.product(range(1, 6), range(12)):
        groups = [Group(rank, size) for rank in range(size)]
        assert sorted(itertools.chain.from_iterable(group.mine(count) for group in groups)) == list(range(count))
        assert {len(group.mine(count)) + group.idle(count) for group in groups} == {-(-count // size)}


def test_two_processes_train_the_adapter_of_one(one: Path, two: Path) -> None:
    check_same(two, one)
    written = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    by_ranks = {f"rank{rank}.{end}" for rank in range(2) for end in ("out", "err")}
    assert {path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()} - by_ranks == written
    assert json.loads((two / "run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_two_processes_load_layers_one_at_a_time(two: Path, tmp_path: Path, cache: Path, tiny_model: Path) -> None:
    """Both phases leave the bytes that they leave without: the adapter of two processes, the objects of one."""
    out = finished(together(2, cache, tmp_path / "out", "--layer-offloading", "on"), tmp_path / "out")
    assert outcome(out) == outcome(two)
    words = ("precompute-ref", cache.parent / "pairs.jsonl", "--model", tiny_model, "--shard-tokens", 300)
    for folder, size, way in (("alone", 1, "off"), ("together", 2, "on")):
        line = [str(word) for word in (*words, "--cache", tmp_path / folder, "--layer-offloading", way)]
        (tmp_path / folder).mkdir()
        ranks = start([line] * size, tmp_path)
        assert [status for status, _, _ in ends(ranks)] == [0] * size
    assert len(tree(tmp_path / "alone", "objects")) > 3
    assert tree(tmp_path / "together", "objects") == tree(tmp_path / "alone", "objects")


@pytest.mark.slow
def test_a_loss_of_the_users_and_an_order_over_processes(tmp_path: Path, cache: Path) -> None:
    """Each process finds the loss itself; the order of the pairs is that of one process."""
    loss = tmp_path / "mine.py"
    loss.write_text(
        "from torch import tanh\n\n\ndef mine(x):\n"
        "    chosen = tanh(x.chosen_token_logps - x.ref_chosen_token_logps).sum(-1)\n"
        "    return -(x.beta * (chosen - (x.rejected_logps - x.ref_rejected_logps))).sigmoid().log()\n"
    )
    more = ["--loss-type", f"{loss}:mine", "--order", "easy_first"]
    expected = alone(cache, tmp_path / "one", *more)
    found = finished(together(2, cache, tmp_path / "two", *more), tmp_path / "two")
    for name, wanted in adapter(expected).items():
        torch.testing.assert_close(adapter(found)[name], wanted, atol=1e-5, rtol=0)
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)  # it has learnt


def test_fsdp_leaves_the_bytes_of_two_processes(tmp_path: Path, cache: Path, two: Path) -> None:
    """What is gathered are the same weights, and what is added up are the same gradients."""
    out = tmp_path / "out"
    finished(together(2, cache, out, "--fsdp"), out)
    assert outcome(out) == outcome(two)
    assert "base loaded  in parts" in (out / "rank0.out").read_text()


@pytest.mark.slow
def test_fsdp_gathers_again_what_a_layer_has_saved(tmp_path: Path, cache: Path) -> None:
    """Without checkpointing and dropout, a LoRA layer's backward reads the frozen weight that its forward has seen."""
    more = "--lora-dropout 0 --no-gradient-checkpointing --max-steps 2".split()
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    finished(together(2, cache, whole, *more), whole)
    finished(together(2, cache, divided, *more, "--fsdp"), divided)
    assert tree(divided, "adapter") == tree(whole, "adapter")


def layers_of(folder: Path, count: int) -> int:
    """Makes a checkpoint in bfloat16, cut up; returns the bytes of its layers in float32, 9 MB each."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = {**json.loads((folder.parent / "tiny" / "config.json").read_text()), "num_hidden_layers": count}
    config |= {"hidden_size": 384, "intermediate_size": 1408, "head_dim": 96, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    layers = sum(p.nbytes for layer in model.model.layers for p in layer.parameters())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(folder.parent / "tiny").save_pretrained(folder)
    return layers


def host_memory_of_the_last() -> None:
    """Leaves in `host.json` by how much resident memory rose at most: in the load, and after it to the first step."""
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: what is freed goes back to the system, however it was cut
    load, step = policy_module.load_policy_base, loop_module.train_step
    rose: list[int] = []

    def n_bytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    def begin(*arguments: Any, **settings: Any) -> Any:
        rose.append(-n_bytes("VmRSS:"))
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        loaded = load(*arguments, **settings)
        rose.append(n_bytes("VmHWM:") + rose[0])
        Path("/proc/self/clear_refs").write_text("5")
        return loaded

    def end(*arguments: Any, **settings: Any) -> Any:
        done = step(*arguments, **settings)
        Path("host.json").write_text(json.dumps([rose[1], n_bytes("VmHWM:") + rose[0]]))
        return done

    policy_module.load_policy_base = begin
    loop_module.train_step = end


@pytest.mark.slow
def test_fsdp_never_holds_the_whole_base(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes each has its half of the layers in its memory, and not once all of them.

    What a run takes beside them (pages of the libraries, above all) is what a run of the tiny model takes. While the
    base is loaded, half of the files, in 16 bits, is mapped into memory too.
    """
    (tmp_path / "tiny").symlink_to(tiny_model)
    whole = layers_of(tmp_path / "large", 24)
    assert whole > 200e6
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    line = ["train", "--cache", "cache", "--output-dir", "out", "--fsdp", "--max-steps", "1", "--eval-share", "0"]
    line += "--per-device-train-batch-size 1 --gradient-accumulation-steps 2 --parity-pairs 2 --lora-r 2".split()
    rose: dict[str, list[int]] = {}
    for name in ("tiny", "large"):
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        precompute_reference(
            PrecomputeConfig(pairs=(pairs,), model=str(tmp_path / name), cache=folder / "cache", dtype="float32")
        )
        found = ends(start([[*line, "--gradient-checkpointing"]] * 2, folder, last=host_memory_of_the_last))
        assert [status for status, _, _ in found] == [0, 0], found
        rose[name] = json.loads((folder / "host.json").read_text())
    loading, after = (large - tiny for large, tiny in zip(rose["large"], rose["tiny"], strict=True))
    print(f"of {whole / 2**20:.0f} MiB: {loading / 2**20:.0f} while loading, {after / 2**20:.0f} afterwards")
    assert 0.5 * whole < loading < 1.2 * whole
    assert 0.5 * whole < after < 0.85 * whole


def whole_and_in_parts(variables: dict[str, str], folders: list[Path], out: Path) -> None:
    """Leaves in `out` which tensors of a model read in parts are not those of the same model read whole."""
    os.environ.update(variables)
    wrong: list[str] = []
    with process_group() as group:
        for folder in folders:
            source = find_model(str(folder))
            assert whole_because(source, group.size) == ""
            more: Any = {"quantization": "none", "dtype": "float32", "device": torch.device("cpu"), "tokenizer": False}
            whole = load_model(source, **more)
            parts = load_model(source, **more, shard=layer_sharding(group, torch.device("cpu")))
            wanted = dict([*whole.base.named_parameters(), *whole.base.named_buffers()])
            found = dict([*parts.base.named_parameters(), *parts.base.named_buffers()])
            assert found.keys() == wanted.keys()
            assert type(parts.base).__name__ == type(whole.base).__name__
            tied = [lm.head.weight is lm.base.get_input_embeddings().weight for lm in (whole, parts)]
            assert tied[0] == tied[1]
            for name, tensor in found.items():
                assert isinstance(tensor, DTensor) == (".layers." in name)
                held: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if held.dtype != wanted[name].dtype or not torch.equal(held, wanted[name]):
                    wrong.append(f"{folder.name} {name}")
    out.write_text(json.dumps(wrong))


def test_what_is_read_in_parts_is_what_is_read_whole(tmp_path: Path, tokenizer: Any) -> None:
    """Rows that three processes cannot share evenly, files in bfloat16 that are cut up, a tied head, experts."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    save_tiny_model(tmp_path / "plain", tokenizer)
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    tied = LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True)).to(torch.bfloat16)
    tied.save_pretrained(tmp_path / "tied", max_shard_size="10KB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 2
    MixtralForCausalLM(MixtralConfig(**small, num_local_experts=5)).save_pretrained(tmp_path / "experts")
    folders = [tmp_path / name for name in ("plain", "tied", "experts")]
    processes = [
        start_process(whole_and_in_parts, variables, folders, tmp_path / f"{rank}.json")
        for rank, variables in enumerate(variables_of(3))
    ]
    for rank, process in enumerate(processes):
        process.join(240)
        assert process.exitcode == 0
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == []


def test_checkpoints_that_cannot_be_read_in_parts_are_reported(tmp_path: Path, sft_adapter: Path) -> None:
    from transformers import AutoConfig, MixtralConfig

    def reason(config: Any, processes: int = 2) -> str:
        config.save_pretrained(tmp_path)
        return whole_because(ModelSource("model", tmp_path, ()), processes)

    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4)
    assert reason(experts, 2) == ""
    assert reason(experts, 3) == "4 experts leave one of 3 processes none"
    # Its checkpoints have tensors that are cut up, whose rows would then be others.
    assert "transformers changes tensors" in reason(AutoConfig.for_model("hrm_text"))
    assert reason(AutoConfig.for_model("llama", **small)) == ""

    def why(quantization: Any = "none", adapter: Any = None, **settings: Any) -> str:
        config = TrainConfig(fsdp=True, **settings)
        return loads_whole_because(config, Group(0, 2), quantization, ModelSource("model", tmp_path, ()), adapter)

    sft = find_adapter(str(sft_adapter))
    assert (why(), why(adapter=sft)) == ("", "")
    assert (why("4bit"), why("8bit", adapter=sft)) == ("", "")  # a layer at a time
    assert "DoRA" in why("4bit", use_dora=True)
    (tmp_path / "adapter").mkdir()
    fields = json.loads((sft_adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**fields, "bias": "lora_only"}))
    with_bias = ModelSource("adapter", tmp_path / "adapter", ())
    assert why(adapter=with_bias) == ""
    assert "changes weights of the base" in why("8bit", with_bias)


def held_by_the_last() -> None:
    """Leaves in `held.json` what this process has of the base's frozen layers in bytes, as each of them is read.

    Before each is read, and after; and when all are divided.
    """
    real, keep = policy_module.shard_base, LayerStore.keep

    def shard(lm: Any, *arguments: Any) -> None:
        def layers() -> list[Any]:
            named = [(name, p) for layer in decoder_layers(lm.backbone) for name, p in layer.named_parameters()]
            return [getattr(p, "_local_tensor", p) for name, p in named if ".lora_" not in name]

        def held() -> int:
            storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layers()}
            return sum(storages.values())

        def seen(self: LayerStore, number: int) -> None:
            found.append(held())
            keep(self, number)
            found.append(held())

        found: list[int] = []
        LayerStore.keep = seen  # type: ignore[method-assign]
        real(lm, *arguments)
        Path("held.json").write_text(json.dumps([*found, held()]))

    policy_module.shard_base = shard  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("bits", "size", "extra"),
    [
        ("4bit", 2, []),
        ("8bit", 2, []),
        pytest.param("4bit", 2, ["--no-gradient-checkpointing"], marks=pytest.mark.slow),
        pytest.param("8bit", 3, ["--no-gradient-checkpointing"], marks=pytest.mark.slow),
    ],
)
def test_fsdp_divides_a_quantised_base(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bits: Any, size: int, extra: list[str]
) -> None:
    """A LoRA over a divided base leaves the bytes of the replicated run, with gradient checkpointing and without."""
    monkeypatch.chdir(tmp_path)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute_reference(
        PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache", quantization=bits)
    )
    more = ["--max-steps", "2"]
    whole = finished(together(size, tmp_path / "cache", tmp_path / "whole", *more), tmp_path / "whole")
    out = tmp_path / "divided"
    finished(together(size, tmp_path / "cache", out, *more, "--fsdp", *extra, last=held_by_the_last), out)
    ours, theirs = tree(out, "adapter"), tree(whole, "adapter")
    if extra:  # the card names the options
        assert ours.pop("adapter/README.md") != theirs.pop("adapter/README.md")
    assert ours == theirs
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    nothing, first, one_divided, second, after = json.loads((tmp_path / "held.json").read_text())
    # Each process reads a layer, quantises it and keeps its share before it reads the next one.
    assert nothing < 0.02 * first
    # Three processes share 32 rows as 11, 11 and 10; this is the last one.
    share: Any = {"rel": 0.02 if size == 2 else 0.1}
    assert one_divided == pytest.approx(first / size, **share)
    assert second == pytest.approx(first + one_divided, rel=0.03)
    assert after == pytest.approx(2 * first / size, **share)


def measured_by_the_last() -> None:
    """Leaves in `peaks.json` what this process's tensors took at the highest point of each step after the first.

    The profiler does not see what a thread of gloo gives back, so that must not be the last to hold what it has
    gathered. Beside each peak stand the bytes of blocks whose end was not seen all the same: it is too high by no more.
    """
    real, gather = loop_module.train_step, torch.distributed.all_gather_into_tensor
    peaks: list[tuple[int, int]] = []

    def gather_and_wait(*arguments: Any, **settings: Any) -> Any:
        work = gather(*arguments, **settings)
        time.sleep(0.02)
        return work

    def measure(run: Any, step: int) -> Any:
        if step == 0:  # makes the moments
            return real(run, step)
        tensors = [*run.lm.model.parameters(), *run.lm.model.buffers()]
        tensors += [t for state in run.optimizer.state.values() for t in state.values()]
        for layer in quantized_layers(run.lm.model):
            levels = [layer.state] if holds_8_bits(layer) else [layer.quant_state, layer.quant_state.state2]
            tensors += [t for level in levels for t in vars(level).values() if isinstance(t, torch.Tensor)]
        local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
        held = {tensor.data_ptr(): tensor.nbytes for tensor in local}
        found: list[Any] = []
        trace = trace_allocator(lambda: found.append(real(run, step)), run.lm.device)
        peaks.append((sum(held.values()) + trace.peak_bytes, trace.grown_bytes))
        Path("peaks.json").write_text(json.dumps(peaks))
        return found[0]

    loop_module.train_step = measure  # type: ignore[attr-defined]
    torch.distributed.all_gather_into_tensor = gather_and_wait


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "checkpointing", "quantization"),
    [
        (2, False, "none"),
        (3, True, "none"),  # rows of 160, 80 and 320, which three cannot share evenly
        (2, True, "4bit"),
        (2, True, "8bit"),
        (3, False, "none"),
        (2, True, "none"),
    ],
)
def test_what_one_process_takes_is_what_the_plan_says(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    checkpointing: bool,
    quantization: Any,
) -> None:
    """The allocator of a process against the simulation: its part of the base, and layers gathered. Within 2 %."""
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model", tokenizer, hidden=160)
    fields = json.loads((model / "config.json").read_text())
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(2 * size))
    precompute_reference(
        PrecomputeConfig(pairs=(pairs,), model=str(model), cache=tmp_path / "cache", quantization=quantization)
    )
    # One forward of two pairs in each process.
    line = ["train", "--cache", "cache", "--output-dir", "out", "--eval-share", "0", "--max-steps", "5", "--fsdp"]
    line += ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", str(size), "--parity-pairs", "2"]
    line += ["--lora-r", "4", "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"]
    found = ends(start([line] * size, tmp_path, last=measured_by_the_last))
    assert [status for status, _, _ in found] == [0] * size, found
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    step, (peak, unseen) = min(enumerate(peaks, start=1), key=lambda item: item[1][1])
    assert unseen < 0.005 * peak, peaks

    view = View.open(tmp_path / "cache")
    config = TrainConfig(lora_r=4, gradient_checkpointing=checkpointing, per_device_train_batch_size=2)
    rows, _ = split(view, None, TrainConfig(eval_share=0))
    schedule = plan_schedule(len(rows), batch=2 * size, epochs=config.num_train_epochs, max_steps=5, seed=config.seed)
    last = [view[rows[i]].ids for i in schedule.rows_of_step(step)][-2:]
    setup = Setup(fields, torch.float32, quantization, config, kernels="cpu", accumulates=False, shards=size)
    lengths = [Pair(len(ids.prompt_ids), len(ids.chosen_ids), len(ids.rejected_ids)) for ids in last]
    predicted = trace_step(setup, lengths).peak()
    print(f"predicted {predicted.n_bytes} over measured {peak}: {predicted.n_bytes / peak:.4f}; {peaks}")
    assert predicted.by_kind["gathered layers"] > 0.05 * predicted.n_bytes
    assert predicted.n_bytes == pytest.approx(peak, rel=0.02)
    whole = trace_step(dataclasses.replace(setup, shards=1), lengths).peak()
    assert whole.by_kind["weights"] > 1.1 * predicted.by_kind["weights"]


def test_two_processes_train_all_weights_as_one(tmp_path: Path, cache: Path) -> None:
    """Gradients of three forwards in two processes; an epsilon that the rounding of their sums does not reach."""
    more = "--no-use-peft --max-steps 3 --adam-epsilon 1e-4".split()
    of_lora = ("--lora-dropout", "--lora-r")
    settings = [
        word for before, word in zip(("", *SETTINGS), SETTINGS, strict=False) if {before, word}.isdisjoint(of_lora)
    ]
    line = ["train", "--cache", str(cache), *settings, *more, "--output-dir"]
    with pytest.raises(SystemExit) as stop:
        main([*line, str(tmp_path / "one")])
    assert stop.value.code == 0
    found = ends(start([[*line, str(tmp_path / "two")]] * 2, tmp_path))
    assert [status for status, _, _ in found] == [0, 0], found
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert len(one) > 20
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "loss",
    [
        "--loss-type beta_dpo,sft --beta-dpo-keep 0.7 --fsdp",
        pytest.param("--loss-type aot", marks=pytest.mark.slow),
        pytest.param("--loss-type bco_pair --bco-reward-shift", marks=pytest.mark.slow),
    ],
)
def test_losses_of_a_whole_step(tmp_path: Path, cache: Path, loss: str) -> None:
    """Pairs of one step meet in the loss, whoever has scored them; the mean of earlier steps is everybody's."""
    more = [*loss.split(), "--max-steps", "3"]
    expected = alone(cache, tmp_path / "one", *[word for word in more if word != "--fsdp"])
    found = finished(together(2, cache, tmp_path / "two", *more), tmp_path / "two")
    for name, wanted in adapter(expected).items():
        torch.testing.assert_close(adapter(found)[name], wanted, atol=1e-5, rtol=0)
    losses = [[line["loss"] for line in lines(out) if "loss" in line] for out in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)  # it has learnt


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--fsdp", "--loss-type", "aot"], ["--fsdp", "--use-dora"]])
def test_four_processes_train_the_adapter_of_one(tmp_path: Path, cache: Path, more: Sequence[str]) -> None:
    """Three forwards for four processes: one of them has none."""
    expected = alone(cache, tmp_path / "one", *[word for word in more if word != "--fsdp"])
    out = tmp_path / "four"
    check_same(finished(together(4, cache, out, *more), out), expected)
    assert "some have nothing to do" in " ".join((out / "rank0.err").read_text().split())


# --------------------------------------------------------------------------- a process that ends


def at_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Replaces a function, in this process for good, by one that acts before its n-th call."""
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == number:
            act()
        return real(*arguments, **settings)

    setattr(owner, name, call)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("something broke")


def killed_in_a_forward() -> None:
    at_call(batch_module, "head_logps", 4, kill)


def killed_between_steps() -> None:
    at_call(loop_module, "train_step", 3, kill)


def asked_to_end() -> None:
    at_call(loop_module, "train_step", 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def raises_in_a_step() -> None:
    at_call(loop_module, "train_step", 3, fail)


@pytest.mark.parametrize(
    ("last", "status", "more"),
    [
        (killed_between_steps, -signal.SIGKILL, []),
        (killed_in_a_forward, -signal.SIGKILL, ["--fsdp"]),
        pytest.param(killed_in_a_forward, -signal.SIGKILL, [], marks=pytest.mark.slow),
        pytest.param(raises_in_a_step, 1, [], marks=pytest.mark.slow),
        pytest.param(raises_in_a_step, 1, ["--fsdp"], marks=pytest.mark.slow),
    ],
)
def test_a_process_that_ends_ends_the_others_and_the_same_command_continues(
    tmp_path: Path, cache: Path, two: Path, last: Callable[[], None], status: int, more: list[str]
) -> None:
    """Faults 61 and 68: within 60 s, with a message; and the continued run ends with the undisturbed one's bytes."""
    out = tmp_path / "out"
    began = time.monotonic()
    first, second = together(2, cache, out, *more, last=last)
    assert second.end()[0] == status
    code, _, err = first.end(within_s=60)
    assert time.monotonic() - began < 60
    assert code == 5
    assert "another process of this run ended" in err
    assert "Traceback" not in err
    assert not (out / "adapter").exists()
    finished(together(2, cache, out, *more), out)
    assert "resuming from step" in (out / "rank0.err").read_text()
    assert outcome(out) == outcome(two)


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path, cache: Path, two: Path) -> None:
    """Slurm signals all of them, at slightly different moments; a step that only some have done cannot be saved."""
    out = tmp_path / "out"
    for status, _, said in ends(together(2, cache, out, "--save-steps", "100", last=asked_to_end)):
        assert status == 128 + signal.SIGUSR1
        assert "Stopped by SIGUSR1" in said
    assert "received SIGUSR1: step 2 of 4" in (out / "rank0.err").read_text()
    finished(together(2, cache, out), out)
    assert "resuming from step 2" in (out / "rank0.err").read_text()
    assert outcome(out) == outcome(two)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_continues(
    tmp_path: Path, cache: Path, one: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Fault 63 for phase two: the same steps, so the same adapter up to the rounding of sums."""
    out = tmp_path / "out"
    if before == 1:
        with monkeypatch.context() as patched:
            patched.setattr(loop_module, "train_step", loop_module.train_step)
            at_call(loop_module, "train_step", 3, fail)
            with pytest.raises(SystemExit):
                main(command(cache, out))
        finished(together(2, cache, out, "--fsdp"), out)
    else:
        ends(together(2, cache, out, last=killed_between_steps))
        alone(cache, out)
    assert (out / "checkpoint-00000004").is_dir()
    check_same(out, one)


def test_ranks_with_other_settings_are_refused(tmp_path: Path, cache: Path) -> None:
    """Fault 66."""
    commands = [command(cache, tmp_path / "out", "--beta", beta) for beta in ("0.1", "0.2")]
    for status, _, err in ends(start(commands, tmp_path)):
        assert status == 2
        assert "different settings or pairs" in err
        assert "beta = 0.1" in err
        assert "beta = 0.2" in err
        assert "learning_rate" not in err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- out of memory


def out_of_memory_with_two_pairs() -> None:
    real = batch_module.predict_groups

    def full(lm: Any, groups: Any) -> Any:
        if torch.is_grad_enabled() and len(groups) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(lm, groups)

    batch_module.predict_groups = full  # type: ignore[attr-defined]


def test_all_take_fewer_pairs_when_one_runs_out(tmp_path: Path, cache: Path) -> None:
    """One process has a smaller card: the run is from the first step on that of one pair a forward, to the byte."""
    short = ["--max-steps", "2", "--eval-share", "0", "--no-load-best-model-at-end"]
    half = ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "6", *short]
    finished(together(2, cache, tmp_path / "half", *half), tmp_path / "half")
    out = tmp_path / "out"
    finished(together(2, cache, out, *short, last=out_of_memory_with_two_pairs), out)
    assert "1 pair per forward" in (out / "rank0.err").read_text()
    left, right = (tree(root, "adapter") for root in (out, tmp_path / "half"))
    for files in (left, right):
        del files["adapter/README.md"]  # which tells the batch that was asked for
    assert left == right


def test_over_a_sharded_base_nothing_is_tried_again(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    first, second = together(2, cache, out, "--fsdp", last=out_of_memory_with_two_pairs)
    status, _, err = second.end(within_s=60)
    assert (status, "out of memory over a sharded base" in err) == (5, True)
    status, _, err = first.end(within_s=60)
    assert (status, "another process of this run ended" in err) == (5, True)
