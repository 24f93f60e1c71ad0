"""Both phases in several processes: the same pairs and the same steps, divided as `precompute-ref` and `train` divide.

Each number of processes is a run of torchrun, which is how users start several; this file is what its processes run,
and so holds both sides. A round is phase one over some pairs into a new cache, and a step of phase two over what the
cache then holds; the first round of a run is not counted. The work is the same for any number of processes, and on a
CPU each computes with one thread, so that processes and not threads are compared.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record as tells_torchrun

from dpoeng.bench.compare import relative, run_module
from dpoeng.bench.measuring.measure import Stopwatch, touch
from dpoeng.bench.measuring.records import cores
from dpoeng.bench.measuring.workload import seal_view, synthetic_pairs
from dpoeng.bench.memory import training_run
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, as_keys, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.loading import load_model, pick_device
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.precompute import default_batch_tokens
from dpoeng.engine.reference.shards import Part, plan_shards
from dpoeng.engine.runtime.distributed import Group, process_group
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.layout import batches_of_pairs
from dpoeng.engine.scoring.pairs import score_pairs
from dpoeng.engine.training.rows import Rows
from dpoeng.engine.training.step import train_step

PHASES = ("reference", "training")

PAIRS_A_FORWARD = 2

_LOSS_TOLERANCE = 1e-3  # relative; what sums in another order move is 1e-6 in float32 and 1e-3 in bfloat16


@dataclass(frozen=True, slots=True)
class RankRound:
    """One phase, once, in all processes together.

    Attributes:
        wall_s: seconds until the last process finished.
        busy_s: CPU seconds of each process, by rank.
        loss: loss of the step; None in phase one.
    """

    wall_s: float
    busy_s: list[float]
    loss: float | None


def usable_ranks(device: torch.device) -> int:
    """Return how many processes can each have a core, or a GPU."""
    return torch.cuda.device_count() if device.type == "cuda" else cores()


def default_ranks(device: torch.device) -> tuple[int, ...]:
    """1, 2, 4, ... up to the number of cores or GPUs; empty if there is only one."""
    sizes = tuple(2**i for i in range(usable_ranks(device).bit_length()))
    return sizes if len(sizes) > 1 else ()


def pairs_for(sizes: Sequence[int]) -> int:
    """Pairs of a round: two forwards of a step, and two shards of phase one, for each of the most processes."""
    return max(16, 2 * PAIRS_A_FORWARD * max(sizes))


def measure_ranks(
    model: str,
    sizes: Sequence[int],
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    repeats: int = 3,
    progress: Progress = QUIET,
) -> dict[int, dict[str, list[RankRound]]]:
    """Runs every number of processes in turn, `repeats` times.

    Args:
        model: a folder with safetensors.
        sizes: numbers of processes, 1 the first of them.
        folder: folder for caches and results.
        device: on a GPU, each process gets its own.
        dtype: dtype of the weights.
        repeats: runs of each size.
        progress: advanced after each run.

    Returns:
        number of processes -> phase -> a round a repeat.

    Raises:
        UserError: more processes than GPUs; or a process failed; or the losses are not those of one process.
    """
    found: dict[int, dict[str, list[RankRound]]] = {size: {phase: [] for phase in PHASES} for size in sizes}
    here = pick_device(device)
    usable = usable_ranks(here)
    if here.type == "cuda" and max(sizes) > usable:
        raise UserError(
            "there are more processes than GPUs",
            code="config-value",
            where="--ranks",
            expected=f"at most {usable}",
            found=str(max(sizes)),
            remedy="name fewer; two processes cannot share a GPU",
        )
    with progress.task("processes", repeats * len(sizes), "runs") as advance:
        for number, size in itertools.product(range(repeats), sizes):
            scratch = folder / f"ranks{size}-{number}"
            scratch.mkdir()
            job = {"model": model, "device": device, "dtype": dtype, "pairs": pairs_for(sizes), "most": max(sizes)}
            job["folder"] = str(scratch)
            rounds = run_module(
                sys.executable, "dpoeng.bench.studies.ranks", job, scratch, name=f"{size} processes", processes=size
            )
            for phase in PHASES:
                found[size][phase].append(RankRound(**rounds[phase]))
            advance(1, f"{size} processes")
    return found


def largest_difference(losses: Mapping[int, Sequence[float]]) -> float:
    """Largest relative difference of a loss of several processes from that of one.

    Raises:
        UserError: it is more than rounding, so that speed would be bought with other numbers.
    """
    worst = max(relative(some, [losses[1][0]] * len(some)) for some in losses.values())
    if worst > _LOSS_TOLERANCE:
        raise UserError(
            "several processes do not compute the losses of one",
            code="bench-losses-differ",
            where="dpoeng bench scale, --ranks",
            expected=f"the loss of a step within {_LOSS_TOLERANCE:g}, relative",
            found="; ".join(f"{size} processes: {', '.join(map(str, some))}" for size, some in losses.items()),
            remedy="speeds of unequal numbers are not reported; please report this",
            exit_status=5,
        )
    return worst


# --------------------------------------------------------------------------- in the processes of torchrun


def run_rank(job: Mapping[str, Any], group: Group, device: torch.device) -> dict[str, RankRound]:
    """Run two rounds in one process and return the second.

    Args:
        job: `model`, `dtype`; `pairs` of a round; `most`, the largest number of processes that is measured, for which
            phase one's work is cut; `folder` that all processes see.
        group: the processes.
        device: of this one.
    """
    lm = load_model(find_model(job["model"]), quantization="none", dtype=job["dtype"], device=device, tokenizer=False)
    set_mode(lm, training=False)
    choose_layout(lm, "auto")
    touch(lm.base)
    pairs = synthetic_pairs(job["pairs"], lm.vocab_size)
    tokens = sum(pair.total_tokens for pair in pairs) // (4 * job["most"])
    shards = [[pairs[i] for i in shard] for shard in plan_shards(pairs, as_keys(map(pair_key, pairs)), tokens)]
    caches = [Path(job["folder"]) / f"cache{number}" for number in range(2)]
    reference = [timed(partial(_score, lm, shards, cache, group), group, device) for cache in caches]
    if group.is_first:
        _write_view(caches[-1], pairs)
    group.wait()
    rows = Rows(View.open(caches[-1]), range(len(pairs)))
    config = TrainConfig.model_validate(
        {
            "per_device_train_batch_size": PAIRS_A_FORWARD,
            "gradient_accumulation_steps": len(rows) // PAIRS_A_FORWARD,
            "gradient_checkpointing": device.type == "cuda",
            # The first step moves the adapter well, so that the second loss tells wrong gradients from right ones.
            "learning_rate": 1e-3,
            "warmup_ratio": 0,
        }
    )
    torch.manual_seed(0)  # every process draws the same start
    losses: list[float] = []
    with training_run(lm, rows, config, group=group) as run:

        def step(number: int) -> None:
            losses.append(train_step(run, number)["loss"])

        training = [timed(partial(step, number), group, device) for number in range(2)]
    return {
        "reference": RankRound(*reference[-1], loss=None),
        "training": RankRound(*training[-1], loss=losses[-1]),
    }


def timed(work: Callable[[], object], group: Group, device: torch.device) -> tuple[float, list[float]]:
    """Seconds from a common start to when the last process is done, and the CPU seconds of each."""
    group.wait()
    watch = Stopwatch(device)
    work()
    seconds = watch.lap()
    group.wait()
    return seconds.wall_s + watch.lap().wall_s, group.gather(seconds.cpu_s)


def _score(lm: CausalLM, shards: Sequence[Sequence[PairIds]], cache: Path, group: Group) -> None:
    """Phase one's work of this process: its shards, scored and committed."""
    store = Store.open(cache, create=True)
    digest = store.put_spec(_SPEC)
    for shard in Part(group.rank + 1, group.size).of(shards):
        batches = batches_of_pairs(shard, default_batch_tokens(lm.device))
        rows = [row for batch, _ in batches for row in score_pairs(lm, [shard[i] for i in batch])]
        store.commit_shard(digest, rows, {})


def _write_view(cache: Path, pairs: Sequence[PairIds]) -> None:
    store = Store.open(cache)
    (digest,) = store.spec_digests()
    seal_view(store, digest, pairs)


_SPEC = ReferenceSpec.from_fields({"bench": "ranks"})


@tells_torchrun
def main() -> None:
    """Reads the job, does its share, and prints, in the first process, what all found."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with process_group() as group:
        device = pick_device(job["device"], group.local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        result = run_rank(job, group, device)
        if group.is_first:
            print("\n" + json.dumps({phase: asdict(one) for phase, one in result.items()}))


if __name__ == "__main__":
    main()
