"""Memory and time of everything that goes through all rows, against the number of rows.

    python -m dpoeng.bench.studies.rows                                   # 1e4 and 1e5 pairs; some minutes
    python -m dpoeng.bench.studies.rows --rows 1000000 --without scratch  # about an hour, 12 GB of disk
    python -m dpoeng.bench.studies.rows --rows 1000000 --only check       # only some of it
    ... --record bench/results/rows-cpu.jsonl                             # a record for each number of rows

Pairs of 300 tokens (100 each of prompt, chosen, rejected), a tokenizer of 2,000 words, and log-probs that are made up:
reading, tokenising, looking up and storing are measured, not the model; `scratch` alone runs one, of one layer. Each
piece of work runs in a separate process. Its time is CPU seconds of all threads, without imports. Its memory is the
most that was resident at any time, libraries included: all of it (the kernel's high-water mark), and the part that is
the process's own, sampled. The rest is mapped files, which the system takes back when it needs the memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from dpoeng.cache.words import MIB

TOKENS: Final = 100  # of the prompt, and of each response
WORDS: Final = 2000
SAMPLED_EVERY_S: Final = 0.02


class OwnMemory(AbstractContextManager["OwnMemory"]):
    """Samples this process's resident memory that does not belong to a file, while it is open. Linux only.

    Attributes:
        peak: the maximum, in bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, _status_bytes("RssAnon") + _status_bytes("RssShmem"))
            if self._done.wait(SAMPLED_EVERY_S):
                return


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def make_pairs(path: Path, count: int, tokens: int = TOKENS) -> None:
    """A JSON Lines file of `count` pairs of random words, `tokens` a part, with a category and a score."""
    random = np.random.default_rng(count)
    words = np.asarray([f"w{number}" for number in range(WORDS)])
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, 1000):
            texts = words[random.integers(0, WORDS, (min(1000, count - start), 3 * tokens))]
            for at, row in enumerate(texts, start):
                parts = (" ".join(row[k * tokens : (k + 1) * tokens]) for k in range(3))
                pair = dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))
                file.write(json.dumps({**pair, "topic": f"topic {at % 7}", "score": at % 5}) + "\n")


def make_model(folder: Path) -> None:
    """A Llama of one layer, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["<unk>", "</s>", *(f"w{number}" for number in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, **size)).save_pretrained(folder)


# --------------------------------------------------------------------------- pieces of work, each in its own process


def _config(folder: Path, *, model: bool = True) -> Any:
    from dpoeng.engine.config.fields import PrecomputeConfig

    fields = {"pairs": [folder / "pairs.jsonl"], "cache": folder / "cache", "device": "cpu"}
    return PrecomputeConfig.model_validate(fields | ({"model": str(folder / "model")} if model else {}))


def _import_tokenizers(folder: Path) -> None:
    """Imports the modules of a process's first tokenizer, which takes as long as thousands of rows."""
    from dpoeng.engine.models.sources import find_model
    from dpoeng.engine.models.tokenizer import load_tokenizer

    load_tokenizer(find_model(str(folder / "model")))


def _check(folder: Path, *, model: bool) -> Callable[[], object]:
    from dpoeng.engine.recipes.check import check_pairs

    config = _config(folder, model=model)
    if model:
        _import_tokenizers(folder)
    return lambda: check_pairs(config)


def _plan(folder: Path) -> Callable[[], object]:
    from dpoeng.engine.recipes.precompute import plan_work
    from dpoeng.engine.runtime.distributed import process_group
    from dpoeng.engine.runtime.progress import QUIET

    config = _config(folder)
    _import_tokenizers(folder)

    def work() -> object:
        with process_group() as group:
            return plan_work(config, group, QUIET)

    return work


def fill(work: Any) -> None:
    """Commits made-up log-probs for all planned pairs: what scoring would leave."""
    from dpoeng.cache.schema import ScoredPair

    random = np.random.default_rng(0)
    for shard in work.mine:
        rows = []
        for ids in shard:
            lengths = (len(ids.chosen_ids) - ids.chosen_start, len(ids.rejected_ids) - ids.rejected_start)
            rows.append(ScoredPair(ids, *(-random.standard_exponential(n, dtype=np.float32) for n in lengths)))
        work.store.commit_shard(work.spec.digest, rows, {})


def make_cache(folder: Path, count: int, tokens: int = TOKENS) -> None:
    """A cache of random pairs: much sooner than by way of texts."""
    from dpoeng.bench.cache import SPEC, synthetic_rows
    from dpoeng.cache.schema import pair_key
    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    store = Store.open(folder / "cache", create=True)
    digest = store.put_spec(SPEC)
    entries = []
    for start in range(0, count, 10_000):
        rows = synthetic_rows(min(10_000, count - start), seed=start, mean_prompt=tokens, mean_response=tokens)
        store.commit_shard(digest, rows, {})
        for at, row in enumerate(rows, start):
            extra = {"topic": f"topic {at % 7}", "score": at % 5}
            entries.append(ViewEntry("pairs.jsonl", at + 1, pair_key(row.ids), extra))
    store.seal(digest)
    store.write_view(digest, "rows", entries, {"files": {}})


def _precompute(folder: Path, cache: str) -> Callable[[], object]:
    from dpoeng.engine.recipes.precompute import precompute_reference

    config = _config(folder).model_copy(update={"cache": folder / cache})
    _import_tokenizers(folder)
    return lambda: precompute_reference(config)


def _cache(folder: Path, what: str) -> Callable[[], object]:
    from dpoeng.cache.analytics import reference_stats
    from dpoeng.cache.exchange.export import export_view
    from dpoeng.cache.info import cache_info
    from dpoeng.cache.reader import View
    from dpoeng.cache.verify import verify

    root = folder / "cache"
    works: dict[str, Callable[[], object]] = {
        "info": lambda: cache_info(root),
        "verify": lambda: verify(root, depth="all"),
        "stats": lambda: reference_stats(View.open(root, beside="chosen")),
        "jsonl": lambda: export_view(View.open(root, beside="chosen"), folder / "export.jsonl"),
        "parquet": lambda: export_view(View.open(root, beside="chosen"), folder / "export.parquet"),
    }
    return works[what]


def _import(folder: Path, suffix: str) -> Callable[[], object]:
    """Takes what `cache export` wrote into a new cache."""
    from dpoeng.cache.exchange.importing import import_rows
    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store

    file, root = folder / f"export{suffix}", folder / f"imported{suffix}"
    if not file.exists():
        _child(suffix[1:], folder)
    shutil.rmtree(root, ignore_errors=True)
    spec = View.open(folder / "cache", beside="chosen", verify="open").spec
    return lambda: import_rows(Store.open(root, create=True), spec, file, "rows")


def _select(folder: Path) -> Callable[[], object]:
    from dpoeng.cache.reader import View
    from dpoeng.cache.selection.rules import Rules, choose
    from dpoeng.cache.selection.views import write_rows

    rules = Rules(rule="large", share=0.5, group_by="topic", drop_duplicates=True, drop_contradictions=True)

    def work() -> None:
        view = View.open(folder / "cache", beside="chosen")
        write_rows(folder / "cache", view, choose(view, rules).rows, "chosen", {}, force=True)

    return work


def _training(folder: Path) -> Callable[[], object]:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.recipes.inputs import open_inputs

    config = TrainConfig.model_validate({"cache": folder / "cache", "output_dir": folder / "run"})

    def work() -> None:
        inputs = open_inputs(config)
        for step in range(inputs.schedule.total_steps):
            for row in inputs.schedule.rows_of_step(step):
                pair = inputs.view[inputs.train_rows.indices[row]]
                parts = (pair.ids.prompt_ids, pair.ids.chosen_ids, pair.ids.rejected_ids)
                np.concatenate([*parts, pair.chosen_logps, pair.rejected_logps])  # reads them, as a batch does

    return work


WORKS: Final[dict[str, tuple[str, Callable[[Path], Callable[[], object]]]]] = {
    "check": ("`check PAIRS`", lambda folder: _check(folder, model=False)),
    "check-model": ("`check PAIRS --model`", lambda folder: _check(folder, model=True)),
    "scratch": ("phase one, a model of one layer", lambda folder: _precompute(folder, "scratch")),
    "plan": ("phase one before its model: read, tokenise, look up, none found", _plan),
    "again": ("phase one again: the same, all found; write the view", lambda folder: _precompute(folder, "cache")),
    "info": ("`cache info`", lambda folder: _cache(folder, "info")),
    "verify": ("`cache verify`", lambda folder: _cache(folder, "verify")),
    "stats": ("`cache stats`", lambda folder: _cache(folder, "stats")),
    "jsonl": ("`cache export .jsonl`", lambda folder: _cache(folder, "jsonl")),
    "parquet": ("`cache export .parquet`", lambda folder: _cache(folder, "parquet")),
    "import-jsonl": ("`cache import .jsonl`, all new", lambda folder: _import(folder, ".jsonl")),
    "import-parquet": ("`cache import .parquet`, all new", lambda folder: _import(folder, ".parquet")),
    "training": ("training: open, hold out, one epoch's order and rows", _training),
    "select": ("`select`: both filters, the half with the largest margins of each topic", _select),
}


_READING: Final = {"check", "check-model", "scratch", "plan", "again"}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Runs one piece of work in this process: CPU seconds, peak resident bytes, and the peak without mapped files.

    What was planned is committed afterwards with made-up log-probs, for phase one again.
    """
    work = WORKS[name][1](folder)
    with OwnMemory() as own:
        began = time.process_time()
        done = work()
        spent = time.process_time() - began
    resident = _status_bytes("VmHWM")
    if name == "plan":
        fill(done)
    return {"cpu_s": spent, "resident_mib": resident / MIB, "own_mib": own.peak / MIB}


def run(count: int, works: Iterable[str], tokens: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measures each piece of work over `count` pairs."""
    found = []
    reading = [name for name in WORKS if name in works and name in _READING]
    others = [name for name in WORKS if name in works and name not in _READING]
    for names in filter(None, (reading, others)):
        with tempfile.TemporaryDirectory(prefix="dpoeng-rows-") as scratch:
            folder = Path(scratch)
            if names is reading:
                make_pairs(folder / "pairs.jsonl", count, tokens)
                make_model(folder / "model")
            else:
                make_cache(folder, count, tokens)
            if "again" in names and "plan" not in names:
                _child("plan", folder)
            for name in names:
                result = {"work": name, "rows": count, "tokens": 3 * tokens, **json.loads(_child(name, folder))}
                say(line(result))
                found.append(result)
    return found


def line(result: dict[str, Any]) -> str:
    """A result as a row of the table of docs/bench.md."""
    each = 1e6 * result["cpu_s"] / result["rows"]
    what = WORKS[result["work"]][0]
    return f"| {what} | {result['rows']:,} | {each:.1f} | {result['own_mib']:.0f} | {result['resident_mib']:.0f} |"


def _child(name: str, folder: Path) -> bytes:
    command = [sys.executable, "-m", "dpoeng.bench.studies.rows", "--work", name, "--folder", str(folder)]
    return subprocess.check_output(command, stderr=subprocess.DEVNULL)


def main() -> None:
    """Prints a table, and writes a record for each number of rows."""
    parser = argparse.ArgumentParser(description="Memory and time against the number of rows.")
    parser.add_argument("--rows", type=int, action="append", help="a number of pairs; may be repeated (1e4 and 1e5)")
    parser.add_argument("--only", action="append", choices=WORKS, help="only this piece of work; may be repeated")
    parser.add_argument("--without", action="append", choices=WORKS, help="not this one; may be repeated")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the prompt, and of each response ({TOKENS})")
    parser.add_argument("--record", type=Path, help="append the records to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measure(options.work, options.folder)))
        return
    import torch

    from dpoeng.bench.measuring.records import append, stamp

    works = [name for name in options.only or WORKS if name not in (options.without or ())]
    head = stamp("rows", torch.device("cpu"), {"tokens": 3 * options.tokens, "works": works})
    print("| work | rows | CPU-µs a row | own MiB | resident MiB |\n|---|---|---|---|---|", flush=True)
    for count in options.rows or (10_000, 100_000):
        found = run(count, works, options.tokens, lambda text: print(text, flush=True))
        if options.record:
            append({**head, "results": found}, options.record)


if __name__ == "__main__":
    main()
