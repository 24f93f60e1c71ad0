"""Exports a trained policy for llama.cpp, vLLM or plain transformers, and verifies what it wrote.

The written model or adapter is loaded again and scores some pairs of the run's cache. Its log-probs must equal those of
the trained policy over the full-precision base, within the rounding of its dtype. Otherwise it is deleted.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import ScoredPair
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.gguf_files.architecture import architecture_of
from dpoeng.engine.models.gguf_files.tokenizer import read_tokenizer
from dpoeng.engine.models.gguf_files.write import GgufType, read_gguf_adapter, write_gguf, write_gguf_adapter
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.sources import ModelSource, find_adapter, find_model
from dpoeng.engine.models.tokenizer import load_tokenizer
from dpoeng.engine.recipes.elsewhere.lora import Matrices, max_lora_rank, one_lora, save_peft
from dpoeng.engine.recipes.evaluate import Trained, find_trained, load_trained
from dpoeng.engine.recipes.inputs import open_views
from dpoeng.engine.recipes.merge import merge, parts_of_run
from dpoeng.engine.reference.loading import load_reference
from dpoeng.engine.reference.parity import ParityReport, compare_with_cache, spread
from dpoeng.engine.runs.folder import MODEL_FOLDER
from dpoeng.engine.runtime.folders import refuse_filled, write_new
from dpoeng.engine.runtime.out_of_memory import release_memory
from dpoeng.engine.runtime.outputs import Kind, refuse_output, writing
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.pairs import score_within_memory

Target = Literal["merged", "gguf", "gguf-adapter", "vllm"]
TARGETS: tuple[Target, ...] = get_args(Target)

_TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 0.1, "q8_0": 0.3}
"""Largest accepted mean difference in nats per token, by the dtype to which the weights were rounded."""
_KINDS: dict[str, GgufType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        target: the program that the export is for.
        path: the written file or folder.
        base: the adapter's base model, or the model that it was merged into.
        dtype: dtype of the weights.
        rank: rank of an adapter; else None.
        max_lora_rank: value for vLLM's --max-lora-rank; None for other targets.
        check: comparison with the trained policy on pairs of the cache; None if skipped.
    """

    target: Target
    path: Path
    base: str
    dtype: str
    rank: int | None = None
    max_lora_rank: int | None = None
    check: ParityReport | None = None


@dataclass(frozen=True, slots=True)
class _Expected:
    """The trained policy's log-probs of some pairs, and the config for scoring the same pairs with an export."""

    config: PrecomputeConfig
    pairs: Sequence[ScoredPair]

    def check(self, dtype: str, model: ModelSource, adapter: ModelSource | None = None) -> ParityReport:
        """Loads a model, or an adapter on it, as phase one does. Raises UserError if its log-probs differ."""
        lm = load_reference(self.config, model, adapter, pick_device(self.config.device))
        tolerance = max(_TOLERANCE[dtype], _TOLERANCE[self.config.dtype])
        rows = range(len(self.pairs))
        found = compare_with_cache(lm, self.pairs, rows, beta=0.1, batch_tokens=4096, tolerance=tolerance)
        if not found.ok:
            raise UserError(
                "the export's log-probs differ from the trained policy's",
                code="export-differs",
                where=str(adapter.folder if adapter else model.folder),
                expected=f"a mean difference of at most {tolerance:g} nats per token",
                found=f"{found.mean_diff:.3g} nats over {found.tokens} tokens",
                remedy="load the adapter with peft instead, and please report the model's architecture",
            )
        return found


def export(
    output_dir: Path,
    target: Target,
    into: Path,
    config: TrainConfig,
    *,
    dtype: str = "auto",
    check_pairs: int = 4,
    force: bool = False,
    progress: Progress = QUIET,
) -> ExportSummary:
    """Writes the result of a run for another program, loads it again and compares it.

    Args:
        output_dir: the run's folder.
        target: the program.
        into: a new folder for `merged` and `vllm`, a file for `gguf` and `gguf-adapter`.
        config: the run's config with your changes; its cache, view, model, dtype and device are used.
        dtype: dtype of the weights for `merged` and `gguf`; `auto` is the base's, `q8_0` is for `gguf` only.
        check_pairs: number of pairs of the cache to compare; 0 for none.
        force: replace an existing file.
        progress: receives bars and notes.

    Raises:
        UserError: the run is not complete, the program cannot load the result, or its log-probs differ.
    """
    whole = (output_dir / MODEL_FOLDER).is_dir()
    base, adapters = (
        (find_model(str(output_dir / MODEL_FOLDER)), []) if whole else parts_of_run(output_dir, config.model)
    )
    _refuse_unfit(target, dtype, base, whole=whole)
    if target in ("merged", "vllm"):
        refuse_filled(into)
    else:
        refuse_output(into, _kind_of_file(), inputs=[output_dir], force=force)
        _refuse_no_gguf(base, target)
    lora = one_lora(base, adapters, "vLLM" if target == "vllm" else "llama.cpp") if target in _ADAPTERS else {}
    max_rank = max_lora_rank(max(len(a) for a, _ in lora.values())) if target == "vllm" else None
    expected = _score(find_trained(output_dir), config, check_pairs) if check_pairs else None
    if target == "vllm":
        return replace(_vllm(base, lora, into, expected), max_lora_rank=max_rank)
    if target == "gguf-adapter":
        with writing(into, _kind_of_file(), force=force) as path:
            return replace(_gguf_adapter(base, lora, path, expected), path=into)
    if target == "merged":
        return _merged(base, adapters, into, dtype, expected, progress)
    with writing(into, _kind_of_file(), force=force) as path:
        return replace(_gguf(base, adapters, path, dtype, expected, progress), path=into)


_ADAPTERS = ("vllm", "gguf-adapter")


def _kind_of_file() -> Kind:
    return Kind("the GGUF file")


def _refuse_unfit(target: Target, dtype: str, base: ModelSource, *, whole: bool) -> None:
    remedies = {
        "merged": f"use the checkpoint {base.folder} directly",
        "vllm": f"`vllm serve {base.folder}` loads the checkpoint directly",
        "gguf-adapter": "use --to gguf",
    }
    if whole and target in remedies:
        raise UserError(
            "this run trained all weights and has no adapter",
            code="full-finetuning",
            where=f"--to {target}",
            found=str(base.folder),
            remedy=remedies[target],
        )
    fixed = target in _ADAPTERS and dtype != "auto"
    if fixed or (target == "merged" and dtype == "q8_0"):
        raise UserError(
            "this target does not support the dtype",
            code="export-dtype",
            where=f"--dtype {dtype}, --to {target}",
            expected="--dtype only with gguf and merged" if fixed else "q8_0 only with gguf",
            remedy="remove --dtype" if fixed else "use --to gguf, or another --dtype",
        )


def _refuse_no_gguf(base: ModelSource, target: Target) -> None:
    """Raises UserError before merging if the GGUF file cannot be written."""
    if base.gguf:
        raise UserError(
            "the base is a GGUF file, and dpoeng cannot merge into one",
            code="model-unloadable",
            where=base.name,
            remedy="give the original checkpoint with --model",
        )
    architecture_of(base.folder)
    if target == "gguf":
        read_tokenizer(base.folder)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "writing GGUF files needs the package gguf",
            code="gguf-package",
            where="--to gguf",
            remedy="pip install 'gguf>=0.17'",
            exit_status=5,
        )


def _score(trained: Trained, config: TrainConfig, count: int) -> _Expected:
    """Scores some pairs with the trained policy over its full-precision base."""
    view, _ = open_views(config)
    reference = view.meta["reference"]
    exact = config.model_copy(update={"quantization": "none"})
    lm = load_trained(trained, exact, view)
    pairs = [view[row].ids for row in spread(range(len(view)), count)]
    scored = score_within_memory(lm, pairs)
    phase_one = PrecomputeConfig.model_validate(
        {
            "model": config.model or reference["model"],
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": config.device,
            "layout": config.layout,
            "batch_tokens": 4096,
        }
    )
    del lm  # the export is loaded next: two models need not fit
    release_memory()
    return _Expected(phase_one, scored)


def _vllm(base: ModelSource, lora: Matrices, into: Path, expected: _Expected | None) -> ExportSummary:
    rank = 0
    check: ParityReport | None = None

    def fill(folder: Path) -> None:
        nonlocal rank, check
        rank = save_peft(folder, lora, base.name)
        check = expected.check("float32", base, find_adapter(str(folder))) if expected else None

    write_new(into, fill)
    return ExportSummary("vllm", into, base.name, "float32", rank, check=check)


def _gguf_adapter(base: ModelSource, lora: Matrices, path: Path, expected: _Expected | None) -> ExportSummary:
    architecture = architecture_of(base.folder)
    write_gguf_adapter(path, architecture, lora, name=f"{Path(base.name).name} DPO")
    check = None
    if expected is not None:
        with tempfile.TemporaryDirectory() as folder:
            save_peft(Path(folder), read_gguf_adapter(path, architecture, lora), base.name)
            check = expected.check("float32", base, find_adapter(folder))
    return ExportSummary("gguf-adapter", path, base.name, "float32", max(len(a) for a, _ in lora.values()), check=check)


def _merged(
    base: ModelSource,
    adapters: Sequence[ModelSource],
    into: Path,
    dtype: str,
    expected: _Expected | None,
    progress: Progress,
) -> ExportSummary:
    merge(base, adapters, into, dtype=dtype, progress=progress)
    try:
        written = find_model(str(into))
        check = expected.check(_dtype_of(written), written) if expected else None
    except BaseException:
        shutil.rmtree(into)
        raise
    return ExportSummary("merged", into, base.name, _dtype_of(written), check=check)


def _gguf(
    base: ModelSource,
    adapters: Sequence[ModelSource],
    path: Path,
    dtype: str,
    expected: _Expected | None,
    progress: Progress,
) -> ExportSummary:
    """Merges into a temporary folder next to the file, in the file's dtype, so that weights are rounded only once."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gguf-") as folder:
        source = base
        if adapters:
            wide = {"q8_0": "float32"}.get(dtype, dtype)
            merge(base, adapters, Path(folder, "merged"), dtype=wide, progress=progress)
            source = find_model(str(Path(folder, "merged")))
        kind = _dtype_of(source) if dtype == "auto" else dtype
        architecture, name = architecture_of(source.folder), Path(base.name).name
        write_gguf(path, source, architecture, name=name, kind=_KINDS[kind], progress=progress)
        check = _read_back(path, source, kind, expected) if expected else None
    return ExportSummary("gguf", path, base.name, kind, check=check)


def _read_back(path: Path, source: ModelSource, kind: str, expected: _Expected) -> ParityReport:
    """Loads the GGUF file with transformers; checks the tokenizer on the pairs' texts, then the log-probs."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gguf-") as folder:
        linked = Path(folder, "model.gguf")  # transformers recognises the format by this ending
        linked.symlink_to(path.resolve())
        model = find_model(str(linked))
        original, written = load_tokenizer(source), load_tokenizer(model)
        for pair in expected.pairs:
            text = original.decode([*pair.ids.prompt_ids.tolist(), *pair.ids.chosen_ids.tolist()])
            ids = [one(text, add_special_tokens=False)["input_ids"] for one in (original, written)]
            if ids[0] != ids[1]:
                raise UserError(
                    "the GGUF file's tokenizer gives other token ids",
                    code="export-differs",
                    where=str(path),
                    expected=f"{ids[0][:8]} ... for a text of the cache",
                    found=f"{ids[1][:8]} ...",
                    remedy="`dpoeng export OUT --to merged --into merged`, then llama.cpp's convert_hf_to_gguf.py",
                )
        return expected.check(kind, model)


def _dtype_of(source: ModelSource) -> str:
    """The widest floating-point dtype of a checkpoint's matrices."""
    from safetensors import safe_open

    with safe_open(source.weight_files[0], framework="pt") as weights:
        found = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return next((name for code, name in (("F32", "float32"), ("BF16", "bfloat16")) if code in found), "float16")
