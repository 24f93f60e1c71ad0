"""Makes docs/errors.md from the sources: for each code its exit status, its meaning and the usual remedy."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "bench", "engine", "kernels", "cache")

# area -> the first words of its codes
AREAS = {
    "Command line and configuration": "usage config init migrate",
    "Pairs": "data",
    "Models, tokenizers and adapters": "tokenizer model adapter checkpoint lora attention layout layer reference "
    "weights quantization",
    "GGUF files": "gguf",
    "The reference cache": "cache import export select ranks rank shard",
    "Training": "fsdp trunk full loss mix parity eval resume training output run tracker sweep page",
    "Judges and rounds": "judge round endpoint",
    "The Hugging Face hub": "hub",
    "The machine": "no bitsandbytes triton memory offload system internal",
    "Measuring and the demo": "bench demo",
}

# Why the message appears: what it does not say itself.
MEANINGS: dict[str, str] = {
    "usage": "The command line is not valid. `--help` after any command lists its options.",
    "config-missing": "Something without a default was not given. You can also put it into `dpoeng.yaml`.",
    "config-unreadable": "The configuration file does not exist, or is not YAML of `field: value` lines.",
    "config-unknown": "No command has this field, or only the other phase has it; the message shows similar names.",
    "config-foreign": "A name of TRL, transformers or peft that dpoeng lacks; docs/trl-versions.md has them all.",
    "config-several": "More than one field is wrong; each is listed with its line.",
    "config-twice": "A field appears twice in the configuration file.",
    "config-exists": "`init` and `migrate` overwrite files only with `--force`.",
    "config-unwritable": "`init` or `migrate` cannot write its file at this path.",
    "init-missing": "A file or folder given to `init` does not exist.",
    "migrate-unreadable": "The file given to `migrate` is not readable Python, JSON or YAML.",
    "migrate-nothing": "The file given to `migrate` does not use TRL and is not a DPO configuration.",
    "config-value": "A field has an invalid value; the message names the field and where it was set.",
    "data-missing": "No such file. Paths are relative to the folder in which the command runs.",
    "data-no-files": "A folder means the data files directly in it, and there are none.",
    "data-splits": "dpoeng reads one split at a time, so that you do not train on test data.",
    "data-not-a-file": "Pipes and devices cannot be read twice, which resuming needs.",
    "data-unknown-kind": "The file ending decides how a file is read; docs/data.md lists the endings.",
    "data-empty": "There are no rows, or none is left after the filter and the unusable rows.",
    "data-damaged": "The file is cut off, or is not what its ending says.",
    "data-encoding": "Texts must be UTF-8.",
    "data-bad-json": "A JSON document is parsed as a whole, so one mistake spoils it; in JSON Lines only one row.",
    "data-bad-csv": "The first line of a CSV file must name the columns.",
    "data-too-large": "The file would need more memory than dpoeng allows; the message names the limit.",
    "data-columns": "No row of the file has a column that you map or filter by, or that dpoeng needs.",
    "data-unreadable": "The system does not let dpoeng read the file.",
    "data-changed": "The file changed while dpoeng read it. Computed values are kept: run again.",
    "data-where": "The filter does not follow the syntax in docs/data.md.",
    "data-prompt-format": "The format around prompts must contain a place for the prompt.",
    "data-one-prompt": "KTO compares a response with those to other prompts, and all rows have one prompt.",
    "data-weight": "`pair_weight_column` needs a number of at least 0 in every training row.",
    "data-rejects": "More rows are unusable than allowed. `dpoeng check` shows the reasons with examples.",
    "hub-name": "Names on the hub have the form organisation/name; docs/hub.md shows the form for data sets.",
    "hub-failed": "The hub is not reachable, does not know the name, or needs a token with access.",
    "hub-paths": "Others cannot load a model from a path on your machine, and the path may contain your name.",
    "model-not-found": "No folder, no GGUF file and no model on a reachable hub has this name.",
    "model-no-safetensors": "dpoeng reads only safetensors weights, because loading a pickle can run code.",
    "model-incomplete": "A file or tensor of the checkpoint is missing. transformers would fill in random numbers.",
    "model-unexpected-tensors": "The files contain tensors of the language model that do not fit config.json.",
    "adapter-unsavable": "peft cannot save the adapter that you want to train; found before the first step.",
    "model-ambiguous": "The folder contains more than one possible model: dpoeng must hash what transformers loads.",
    "checkpoint-claims": "The checkpoint states a size, a pattern or a file name that no real model has.",
    "checkpoint-json": "config.json, adapter_config.json or the list of shards is damaged.",
    "model-unloadable": "transformers cannot load the folder: an unknown architecture, or files that do not fit.",
    "model-unsupported": "dpoeng's probe of this architecture differs from the model's own forward.",
    "weights-bad": "A weight file is cut off or damaged.",
    "reference-not-finite": "The model's output is NaN or infinite: damaged weights, or a dtype that is too narrow.",
    "reference-tokens": "Another trainer tokenised or truncated a pair differently than phase one.",
    "reference-mismatch": "Another trainer's reference has another model, adapter or precision than phase one's.",
    "reference-trainer": "`with_cached_reference` needs TRL's DPOTrainer, before training.",
    "reference-drifted": "With your library versions, the same reference gives other numbers than those in the cache.",
    "tokenizer-missing": "The tokenizer's files are not next to the model, or are not readable.",
    "tokenizer-mismatch": "The tokenizer gives ids that the embedding does not have: it belongs to another model.",
    "tokenizer-no-eos": "Texts end with the end token, and the tokenizer names none.",
    "tokenizer-claims": "The tokenizer is too large, could make texts endless, or may never finish on some.",
    "tokenizer-template-limits": "A chat template is a program. One that runs away is stopped at its limits.",
    "tokenizer-failed": "The tokenizer's library gave up, usually because a pattern can match in too many ways.",
    "tokenizer-no-template": "Messages need the SFT model's chat template.",
    "adapter-not-found": "The folder is not what peft's `save_pretrained` writes.",
    "adapter-mismatch": "The adapter was trained on another base, or is damaged. `adapter_config.json` names its base.",
    "adapter-mode": "The adapter mode does not fit the reference; docs/guide.md has the three modes.",
    "trunk-below": "Stored hidden states replace the layers below them, so those must not be trained.",
    "trunk-unsupported": "This run, model or checkpoint cannot start from stored hidden states.",
    "lora-no-target": "The model has none of these modules; the message lists those that it has.",
    "layout-unsupported": "With this attention no prompt can run once for two responses. `auto` falls back by itself.",
    "attention-unsupported": "This attention does not work here; `segments` works wherever a prompt is shared.",
    "layer-offloading-unsupported": "A trial showed that the layers cannot be run one at a time with the same bits.",
    "gguf-missing": "No such file.",
    "gguf-format": "The file is not GGUF 2 or 3, or is cut off.",
    "gguf-unsupported": "transformers does not support the contents of this GGUF file.",
    "gguf-package": "An optional package is missing.",
    "weights-gguf": "An optional package is missing.",
    "gguf-output-exists": "The folder for a converted model is in use.",
    "quantization-stored": "The checkpoint is quantised already, and differently than requested.",
    "gguf-unwritable": "dpoeng cannot write this model as GGUF; llama.cpp's own converter may.",
    "gguf-quantization": "A GGUF file is quantised already.",
    "cache-not-found": "There is no reference cache in this folder. Phase one makes it.",
    "cache-not-empty": "A cache needs an empty or new folder, so that it cannot mix with your files.",
    "cache-format": "The file that identifies the folder as a cache is unreadable.",
    "cache-future": "The cache was written by a newer dpoeng.",
    "cache-corrupt": "A file of the cache does not match its hash. Phase one sets it aside and recomputes its rows.",
    "cache-not-plain": "Links and devices inside a cache are refused; the folder itself may be reached by a link.",
    "cache-no-trunk": "No hidden states were stored at this layer for this reference.",
    "cache-no-view": "The cache has no set of pairs of this name.",
    "cache-no-spec": "The cache is empty.",
    "cache-view-unnamed": "The cache contains several sets of pairs: name one.",
    "cache-view-name": "The name of a set of pairs becomes a file name, so some characters are not allowed.",
    "cache-view-exists": "Two caches have a set of pairs of the same name; only one can keep it.",
    "cache-which-spec": "The start of a digest must match exactly one reference.",
    "cache-spec-in-use": "A set of pairs still uses this reference.",
    "cache-changed": "The set of pairs was rewritten by another process.",
    "cache-incomplete": "A set of pairs contains a pair that has no numbers.",
    "cache-key-collision": "Two pairs have the same 128-bit hash. dpoeng stops and does not guess.",
    "cache-disk-small": "The results will not fit on the disk. Checked before anything was loaded.",
    "cache-disk-full": "The disk is full. Committed results are kept.",
    "cache-read-only": "The cache is not writable. A complete cache may be read-only.",
    "cache-disk-error": "The disk failed. Committed results are kept.",
    "cache-too-many-files": "The system's limit of open files is reached.",
    "cache-rows": "A view contains pairs, unpaired (labelled) or ranked rows; not every command supports all three.",
    "cache-sums-only": "The cache has only imported sums, and this loss needs the log-prob of each token.",
    "ranks-differ": "All processes of a run need the same files and settings.",
    "ranks-one-gpu": "Training in several processes needs a GPU for each.",
    "rank-lost": "Another process of the run failed: its own message says why.",
    "fsdp-unavailable": "FSDP shards a base of 4, 16 or 32 bits over torchrun's processes.",
    "shard-and-ranks": "Use `--shard` or torchrun to divide work, not both.",
    "import-columns": "The file lacks columns that `dpoeng cache export` writes.",
    "select-nothing": "No row passes the filters of `select`.",
    "select-exists": "`select` replaces a view only with `--force`, and never one that it selects from.",
    "select-against": "Gaps between two models need the log-probs of both on every pair.",
    "select-column": "A column to select or group by is missing, or contains no number.",
    "select-score": "Each kind of rows has its own scores: a single response has no margin.",
    "import-row": "A row contains numbers that no model can give. Nothing was imported.",
    "export-format": "The file ending decides the format: .jsonl or .parquet.",
    "export-adapter": "vLLM and llama.cpp load only plain LoRA on linear layers; the message names the difference.",
    "export-dtype": "`--dtype` sets the dtype of a checkpoint or a GGUF model; adapters are always float32.",
    "export-differs": "The export was loaded again and gave other log-probs or token ids. It was deleted.",
    "export-trainer": "Each trainer has its own format, and some ignore such files: then dpoeng writes none.",
    "full-finetuning": "The option cannot be combined with training all weights (`use_peft: false`).",
    "parity-failed": "Policy and cache disagree before the first step: another model, adapter or precision.",
    "mix-reference": "One run has one reference: numbers of two cannot be mixed.",
    "mix-empty": "All pairs of one mixed set would be held out.",
    "loss-own-missing": "dpoeng does not find the file, module or function of your own loss.",
    "loss-own-unfit": "Your own loss failed the test on made-up pairs, which comes before anything is loaded.",
    "loss-rows": "Pair losses need pairs and ranked rows; losses of labels and of rankings need theirs.",
    "eval-reference": "Both sets of pairs must be scored by one reference.",
    "eval-empty": "The option needs held-out pairs, and there are none.",
    "eval-changed": "Splitting must give the same held-out pairs again, so pairs and split must not change.",
    "eval-trained-on": "An evaluation on training pairs says nothing about other pairs.",
    "resume-nothing": "`--resume` needs a checkpoint, and the folder has none.",
    "resume-changed": "The folder contains a run with other settings; continuing would mix two runs.",
    "checkpoint-damaged": "A needed checkpoint does not match its checksum.",
    "training-not-finite": "The loss or its gradient is NaN or infinite. The newest checkpoint is from before.",
    "tracker-missing": "The package of a tracker in report_to is not installed. Checked before anything was loaded.",
    "tracker-failed": "A tracker could not start. One that fails later is dropped with a note; the run continues.",
    "output-unwritable": "The output folder is full, read-only, or a file.",
    "output-exists": "dpoeng replaces a file that it did not write for this purpose only with `--force`.",
    "output-protected": "dpoeng never overwrites a command's input, or the files of a cache or run.",
    "output-foreign": "A run replaces `adapter/`, `model/` and its logs; the ones here are not from a run.",
    "output-in-use": "Two runs in one folder would mix their metrics and checkpoints. Killed runs do not count.",
    "run-not-found": "The folder was not written by `dpoeng train`.",
    "run-damaged": "A log of the run is damaged.",
    "sweep-combinations": "Every combination is checked before the first run; these are wrong.",
    "sweep-runs": "The number of runs is the product of the numbers of values, and grows quickly.",
    "sweep-held-out": "Runs can be compared only on the same held-out pairs, and there must be some.",
    "sweep-ranks": "A sweep uses one process; its runs follow each other.",
    "sweep-failed": "A failed run does not end the others. The table above shows the complete ones.",
    "judge-rule": "A judging function is found by its file or module, and called with a prompt and an answer.",
    "judge-model": "A reward model is a transformers checkpoint with one output.",
    "judge-template": "The template of a judge's prompt must contain places for the prompt and the answers.",
    "judge-verdicts": "The judge's replies do not have the requested form. More replies might cost money.",
    "round-pairs": "The cache does not contain texts: dpoeng reads them again from the files of phase one.",
    "endpoint-address": "dpoeng writes the address into records, so it must not contain a secret.",
    "endpoint-model": "A server may have several models, or not name its model.",
    "endpoint-key": "The server needs a valid key.",
    "endpoint-refused": "The server does not have this path or model.",
    "endpoint-failed": "The server was repeatedly unreachable, busy or failing.",
    "page-unwritable": "The page's file is not writable.",
    "round-start": "Rounds start from a run's policy, and some kinds of training cannot be continued this way.",
    "round-prompts": "The prompts of a round come from the run's pairs or from a file.",
    "round-reference": "A round's pairs must have the run's tokens; with `first`, its reference must be the run's.",
    "round-changed": "Rounds in one folder share their settings; only their number may grow.",
    "round-damaged": "rounds.json cannot be read.",
    "round-empty": "No prompt has a better and a worse answer, so there is nothing to train on.",
    "round-server": "The server must offer the round's policy under the name in the message.",
    "no-gpu": "torch finds no CUDA device. `dpoeng doctor` says why.",
    "system-temporary-full": "Phase one keeps tokens of many pairs in the temporary folder while it runs.",
    "triton-unusable": "Triton could not compile or run a kernel; usually a C compiler is missing.",
    "bitsandbytes-unusable": "8-bit and 4-bit need bitsandbytes. `dpoeng doctor` tries it.",
    "memory-short": "A simulation says that the phase would not fit. `dpoeng plan` shows more.",
    "memory-full": "The process ran out of memory.",
    "offload-room": "There is no room for hidden states between two layers. Checked before anything was computed.",
    "system-error": "The operating system refused to read or write a file.",
    "system-warning": "PYTHONWARNINGS=error turns a library's warning about future changes into an error.",
    "internal-error": "A bug in dpoeng.",
    "bench-no-peer": "Comparing with TRL needs a Python that has it.",
    "bench-disk-small": "The measured model is first written to the disk. Nothing was written yet.",
    "bench-peer-failed": "The compared process failed; its last lines are shown.",
    "bench-losses-differ": "dpoeng reports a figure of several processes only if they compute the same losses as one.",
    "demo-model": "The demo needs a small model from the hub or a package index.",
}

# The usual remedy of codes that are raised in several places, or whose remedy depends on the input.
REMEDIES: dict[str, str] = {
    "data-no-files": "name the files, or the folder with the files",
    "data-splits": "name one split, or its files",
    "hub-name": "write organisation/name, as the message shows",
    "hub-failed": "check name and network; run `hf auth login` for private and gated repositories",
    "hub-paths": "run the command that the message prints",
    "data-bad-csv": "write the file with a CSV library, column names first",
    "lora-no-target": "name modules of this model",
    "usage": "`--help` after the command lists its options",
    "config-value": "correct the value, or remove the field",
    "config-unknown": "write the name that the message proposes, or remove the field",
    "config-foreign": "write the field that the message names",
    "parity-failed": "train with the model, adapter and precision that the cache names, or run precompute-ref again",
    "config-missing": "name the file or model, or put it into dpoeng.yaml",
    "migrate-unreadable": "name a script (.py), or a configuration in YAML or JSON",
    "data-empty": "use a wider --where; `dpoeng check` shows why rows were left out",
    "data-missing": "check the path, or copy the whole folder again",
    "data-too-large": "write JSON Lines, one object per line, or smaller batches of fewer columns",
    "data-damaged": "write or copy the file again",
    "data-unreadable": "check its permissions and the disk",
    "data-changed": "run again once nothing writes to the file",
    "data-columns": "map the columns with --columns, or rename them",
    "data-unknown-kind": "rename the file",
    "data-bad-json": "write one object per line and name the file .jsonl",
    "data-weight": "correct the row, or name another column with --pair-weight-column",
    "tokenizer-claims": "download the tokenizer again, from a source that you trust, or name another with --tokenizer",
    "model-not-found": "check the path; for a hub id, the name, the network and HF_TOKEN",
    "model-incomplete": "download or save the checkpoint again",
    "model-unloadable": "check config.json, or install a newer transformers",
    "adapter-unsavable": "use --adapter-mode continue, or merge the SFT adapter into the base first",
    "model-ambiguous": "move the adapter's files to a separate folder and give that as --adapter",
    "model-unsupported": "please report the architecture",
    "tokenizer-missing": "copy the tokenizer files from the model that this one was trained from",
    "adapter-not-found": "name the folder that peft's `save_pretrained` wrote",
    "adapter-mismatch": "use the base that the adapter was trained on",
    "adapter-mode": "leave --adapter-mode out: auto chooses a mode that fits",
    "attention-unsupported": "leave --attention out",
    "layer-offloading-unsupported": "use --layer-offloading off, with fewer bits or a larger device",
    "offload-room": "lower --offload-gib, or name a folder on a larger disk with --offload-folder",
    "reference-tokens": "score the rows with the other trainer's tokenizer, length and end token",
    "reference-trainer": "call it once, on a constructed DPOTrainer, before train()",
    "export-trainer": "docs/other-trainers.md: the formats of each trainer",
    "reference-not-finite": "use --dtype bfloat16 or float32; else the weights are damaged",
    "quantization-stored": "leave --quantization out, or name the full-precision checkpoint",
    "export-dtype": "leave --dtype out",
    "export-differs": "load the adapter with peft, or use `dpoeng export OUT --to merged --into merged`",
    "gguf-unwritable": "merge, then use llama.cpp's convert_hf_to_gguf.py",
    "gguf-format": "download the file again, or give the model as safetensors",
    "bitsandbytes-unusable": "pip install 'bitsandbytes>=0.50', or use --quantization none",
    "cache-which-spec": "`dpoeng cache info` shows the references",
    "cache-disk-small": "free some space, or choose another folder with --cache",
    "cache-incomplete": "run the same `dpoeng precompute-ref` again: it computes what is missing",
    "cache-no-trunk": "run the same `dpoeng precompute-ref` again with --trunk-layer",
    "trunk-below": "name upper layers with --train-last-layers or --layers-to-transform, or use --trunk-layer 0",
    "trunk-unsupported": "leave the named option out, or use --trunk-layer 0 to run all layers",
    "cache-no-view": "name an existing view, or run `dpoeng precompute-ref` to its end",
    "select-nothing": "widen the bounds, or keep a larger share",
    "select-exists": "choose another name, or add `--force`",
    "select-against": "run phase one with the other model on the same pairs",
    "select-column": "name a column that every row has",
    "select-score": "name one of the scores that the message lists with `--by` or `--order-by`",
    "mix-reference": "score both sets of pairs by the same reference",
    "mix-empty": "lower `--eval-share`, or name other pairs with `--eval-view`",
    "loss-own-missing": "correct the name of the file, module or function",
    "loss-own-unfit": "correct the function as the message says",
    "loss-rows": "use one of the losses that the message lists, or name another view",
    "cache-view-unnamed": "choose one with --view",
    "cache-spec-in-use": "remove the view's file in views/ first",
    "cache-not-plain": "remove the link, or name the cache's real folder",
    "cache-format": "if dpoeng wrote this folder, restore the line that the message shows",
    "import-columns": "write these columns; from TRL: `trainer.train_dataset.to_parquet(FILE)`",
    "ranks-differ": "give every process the same command and files",
    "fsdp-unavailable": "leave --fsdp out, or start under torchrun with a supported dtype and optimizer",
    "full-finetuning": "leave the named option out",
    "eval-empty": "raise --eval-share, or name other pairs with --eval-view",
    "run-not-found": "give the --output-dir of a run",
    "output-unwritable": "free some space, or name a folder that you may write to",
    "output-exists": "name another file, or overwrite this one with --force",
    "output-protected": "name another file, or another folder with --output-dir",
    "run-damaged": "remove the line that the message names; only its figures are lost",
    "sweep-runs": "vary less, or raise --max-runs",
    "sweep-held-out": "score a file of held-out pairs and name its view with --eval-view",
    "judge-rule": "correct the name or the code of the function",
    "judge-model": "name a reward model with --judge",
    "judge-template": "put {prompt}, {first} and {second} into the file of --template",
    "resume-changed": "use the same values to continue, another --output-dir for a second run, or --no-resume to start "
    "over here (this removes the old run's checkpoints)",
    "memory-full": "use smaller batches; `dpoeng plan` shows what fits",
    "round-start": "change the setting that the message names",
    "round-prompts": "correct the file, or remove --prompts",
    "memory-short": "use one of the changes in the message; `dpoeng plan` shows what each saves",
    "bench-peer-failed": "read the last lines of the peer's output",
}

EXAMPLE = """$ dpoeng precompute-ref --model sft-model
error: no pairs given [config-missing]
  where:    pairs
  expected: at least one file, e.g. dpoeng precompute-ref pairs.jsonl --model sft-model
  remedy:   name the file, or write `pairs: [pairs.jsonl]` into dpoeng.yaml
"""

HEAD = f"""# Errors

Each error that you can correct is one message on stderr: what is wrong and its `[code]`, where, what dpoeng expected,
what it found, and what to do. `--debug` anywhere in the command adds the traceback.

```text
{EXAMPLE}```

| exit status | |
|---|---|
| 0 | done |
| 1 | a bug in dpoeng |
| 2 | the command, the configuration or the model |
| 3 | the data (also: `dpoeng check` found an error) |
| 4 | the cache (also: `cache verify` found damage) |
| 5 | the machine: disk, memory, GPU, libraries (also: `dpoeng doctor` found an error) |
| 6 | a measurement is worse than allowed (`bench checks`) |
| 141 | the output's reader ended, as with `| head` |
| 130, 138, 143 | stopped by Ctrl-C, SIGUSR1 or SIGTERM; the same command continues ([how](resume.md)) |

`make docs-errors` generates this page from the sources. A test compares them, and triggers every code.
"""


@functools.cache
def codes() -> dict[str, list[ast.Call]]:
    """Every code in the sources -> the calls that raise it, by the syntax tree."""
    found: dict[str, list[ast.Call]] = {}
    for where, call in error_calls():
        code = argument(call, "code")
        if code is None:
            name = "cache-corrupt"  # CacheError's own
        else:
            assert isinstance(code, ast.Constant), f"{where}: a code is a constant, so that it can be searched for"
            name = str(code.value)
        found.setdefault(name, []).append(call)
    return found


def error_calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call that makes a UserError or one of its kind."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                if isinstance(node, ast.Call) and name in ("UserError", "CacheError"):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def argument(call: ast.Call, name: str) -> ast.expr | None:
    """A keyword argument of a call."""
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def statuses(calls: list[ast.Call]) -> list[int]:
    """The exit statuses with which a code is raised; click's own, 2, if it is computed."""
    found = set()
    for call in calls:
        status = argument(call, "exit_status")
        default = 4 if ast.unparse(call.func) == "CacheError" else 2
        found.add(int(str(status.value)) if isinstance(status, ast.Constant) else default)
    return sorted(found)


def remedy(code: str, calls: list[ast.Call]) -> str:
    """The usual remedy: REMEDIES', or the only one in the sources."""
    if code in REMEDIES:
        return REMEDIES[code]
    (text,) = {literal(argument(call, "remedy")) for call in calls}
    assert text, f"give {code} a usual remedy in REMEDIES"
    return text


def literal(node: ast.expr | None) -> str:
    """The text of a literal, with variables in capitals; else empty."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = [part if isinstance(part, ast.Constant) else part.value for part in node.values]  # type: ignore[attr-defined]
    return "".join(str(p.value) if isinstance(p, ast.Constant) else ast.unparse(p).upper() for p in parts)


def render() -> str:
    """The page."""
    found = codes()
    parts = [HEAD]
    for area, words in AREAS.items():
        parts.append(f"\n## {area}\n\n| code | exit status | meaning | usual remedy |\n|---|---|---|---|\n")
        for code, meaning in MEANINGS.items():
            if code.split("-")[0] in words.split():
                status = ", ".join(map(str, statuses(found[code])))
                parts.append(f"| `{code}` | {status} | {meaning} | {remedy(code, found[code])} |\n")
    return "".join(parts)
