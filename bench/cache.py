"""Measures the reference cache: writing, looking up, opening, reading, verifying; and hashing the weights of a model.

    python -m dpoeng.bench.cache --pairs 1000000

docs/cache-format.md lists the required figures. Reading is measured in a separate process, so that its memory is that
of the cache and not of the benchmark.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpoeng.cache.fingerprint import weight_digests
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify
from dpoeng.cache.words import MIB

SHARD_ROWS = 50_000  # about 64 MB of the rows below
SPEC = ReferenceSpec.from_fields({"benchmark": "synthetic"})
_GB = 1e9


def synthetic_rows(
    count: int, *, seed: int = 0, mean_prompt: int = 60, mean_response: int = 60, vocabulary: int = 50_000
) -> list[ScoredPair]:
    """Pairs as phase one would write them: random ids and log-probs, lengths uniform from 1 to twice the mean."""
    random = np.random.default_rng(seed)
    lengths = np.stack(
        [random.integers(1, 2 * mean + 1, count) for mean in (mean_prompt, mean_response, mean_response)], axis=1
    )
    ids = as_ids(random.integers(0, vocabulary, int(lengths.sum())))
    logps = -random.standard_exponential(int(lengths[:, 1:].sum()), dtype=np.float32)
    id_ends, logp_ends = lengths.ravel().cumsum(), lengths[:, 1:].ravel().cumsum()
    id_parts = np.split(ids, id_ends[:-1])
    logp_parts = np.split(logps, logp_ends[:-1])
    return [
        ScoredPair(PairIds(*id_parts[3 * i : 3 * i + 3]), *logp_parts[2 * i : 2 * i + 2])  # type: ignore[arg-type]
        for i in range(count)
    ]


def run(
    *,
    pairs: int = 1_000_000,
    weight_bytes: int = 2_000_000_000,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs all measurements.

    Args:
        pairs: size of the largest cache; sizes grow by ten from 1000. 1e6 pairs need 1.3 GB of disk and some minutes.
        weight_bytes: size of the made-up checkpoint.
        folder: folder to write to, by default the system's temporary one. All files are removed at the end.
        say: receives progress messages.

    Returns:
        `sizes`: a list: for each number of pairs, microseconds per pair of each step;
        `read`: how fast a training process reads the largest cache (see `measure_reading`);
        `weights`: GB/s of the identity hash and of sha256 over the same mapped file.
    """
    sizes = [10**k for k in range(3, 10) if 10**k < pairs] + [pairs]
    steps = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for count in sizes:
            say(f"cache of {count:,} pairs")
            root = Path(name) / str(count)
            steps.append(measure_size(root, count))
        say("reading")
        code = "import sys; from dpoeng.bench import cache; cache.print_reading(sys.argv[1])"
        read = json.loads(subprocess.check_output([sys.executable, "-c", code, str(root)]))
        say("weights")
        weights = _measure_weights(Path(name) / "model.safetensors", weight_bytes)
    return {"sizes": steps, "read": read, "weights": weights}


def measure_size(root: Path, count: int) -> dict[str, Any]:
    """Microseconds per pair of writing and looking up. The time to make the rows is not counted."""
    store = Store.open(root, create=True)
    spec = store.put_spec(SPEC)
    entries: list[ViewEntry] = []
    sample: list[PairIds] = []
    commit_s = 0.0
    for start in range(0, count, SHARD_ROWS):
        rows = synthetic_rows(min(SHARD_ROWS, count - start), seed=start)
        entries += [ViewEntry("synthetic", start + i + 1, pair_key(row.ids)) for i, row in enumerate(rows)]
        sample += [row.ids for row in rows[:200]]
        commit_s += _timed(lambda rows=rows: store.commit_shard(spec, rows, {}))  # type: ignore[misc]
    index = store.lookup(spec)
    lookup_s = _timed(lambda: store.lookup(spec))
    hits_s = _timed(lambda: [index.get(ids) for ids in sample])
    assert all(ids in index for ids in sample)
    view_s = _timed(lambda: store.write_view(spec, "all", entries, {}))
    store.seal(spec)
    return {
        "pairs": count,
        "bytes_a_pair": sum(reference.bytes for reference in index.objects) / count,
        "commit_us": commit_s / count * 1e6,
        "lookup_us": lookup_s / count * 1e6,
        "hit_us": hits_s / len(sample) * 1e6,
        "write_view_us": view_s / count * 1e6,
        "open_ms": min(_timed(lambda: View.open(root, verify="open")) for _ in range(3)) * 1e3,
    }


def measure_reading(root: Path, rows: int = 200_000) -> dict[str, float]:
    """Measures reading speed and memory.

    Returns:
        open_ms, open_verified_ms: time to open the view, without and with hashing every byte;
        rows_per_s, random_rows_per_s: one core, zero-copy, in order and shuffled, the best of three;
        anonymous_mib: how much opening and reading grow the process's own memory (without page cache);
        verify_gb_per_s: depth "full"; semantic_rows_per_s: depth "semantic".
    """
    verify(root)  # so that the page cache is warm
    before = _anonymous_bytes()
    open_s = _timed(lambda: View.open(root, verify="open"))
    view = View.open(root, verify="open")
    count = min(rows, len(view))
    shuffled = np.random.default_rng(0).permutation(len(view))[:count].tolist()
    rows_s = min(_timed(lambda: _read(view, range(count))) for _ in range(3))
    random_s = min(_timed(lambda: _read(view, shuffled)) for _ in range(3))
    anonymous = _anonymous_bytes() - before
    report = min((verify(root) for _ in range(3)), key=lambda report: report.seconds)
    semantic = verify(root, depth="semantic")
    return {
        "pairs": len(view),
        "bytes": report.bytes,
        "open_ms": open_s * 1e3,
        "open_verified_ms": _timed(lambda: View.open(root)) * 1e3,
        "rows_per_s": count / rows_s,
        "random_rows_per_s": count / random_s,
        "anonymous_mib": anonymous / MIB,
        "verify_gb_per_s": report.bytes / report.seconds / _GB,
        "semantic_rows_per_s": len(view) / semantic.seconds,
    }


def print_reading(root: str) -> None:
    """Prints `measure_reading` as JSON; entry point of the separate process."""
    print(json.dumps(measure_reading(Path(root))))


def _read(view: View, places: Sequence[int]) -> None:
    for i in places:
        view[i]


def _measure_weights(path: Path, size: int) -> dict[str, float]:
    """GB/s over a file that was just written, so it is in the page cache."""
    tensors = 64
    each = size // tensors // 4 * 4
    header = json.dumps(
        {
            f"layers.{k}.weight": {"dtype": "F32", "shape": [each // 4], "data_offsets": [k * each, (k + 1) * each]}
            for k in range(tensors)
        }
    ).encode()
    block = np.random.default_rng(0).bytes(each)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(tensors):
            file.write(block)
    total = path.stat().st_size
    identity_s = min(_timed(lambda: weight_digests([path])) for _ in range(3))
    return {
        "bytes": total,
        "identity_gb_per_s": total / identity_s / _GB,
        "sha256_gb_per_s": total / _timed(lambda: _sha256(path)) / _GB,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return hashlib.sha256(data).hexdigest()


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _anonymous_bytes() -> int:
    """Resident memory of this process that does not belong to a file. Linux only; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(description="Measure the reference cache.")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of the largest cache (default: 1e6)")
    parser.add_argument("--weight-bytes", type=int, default=2_000_000_000, help="size of the made-up checkpoint")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    results = run(
        pairs=options.pairs,
        weight_bytes=options.weight_bytes,
        folder=options.folder,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
