"""Makes docs/errors.md of the sources: for each code its exit status, its meaning and the usual remedy."""

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
    "The machine": "no bitsandbytes triton memory offload system internal",
    "Measuring and the demo": "bench demo",
}

# Why the message appears: what it cannot say itself.
MEANINGS: dict[str, str] = {
    "usage": "The command line is not understood. `--help` behind any command lists what it takes.",
    "config-missing": "Something without a default was not given. It may stand in `dpoeng.yaml` instead.",
    "config-unreadable": "The configuration file is not there, or is no YAML of `field: value` lines.",
    "config-unknown": "A name that no command knows, or only the other phase; the nearest ones are named.",
    "config-foreign": "A name of TRL, transformers or peft that dpoeng lacks; docs/trl-versions.md has them all.",
    "config-several": "More than one field is wrong; each is listed with its line.",
    "config-twice": "A field appears twice in the configuration file, so which one is meant?",
    "config-exists": "`init` and `migrate` overwrite nothing without `--force`.",
    "config-unwritable": "The file that `init` or `migrate` writes cannot be made where it was named.",
    "init-missing": "A file or folder that was named to `init` is not there.",
    "migrate-unreadable": "The file given to `migrate` is no readable Python, JSON or YAML.",
    "migrate-nothing": "The file given to `migrate` makes no call of TRL and is no DPO configuration.",
    "config-value": "A field has a value that it cannot have; the message names the field and where it was set.",
    "data-missing": "No such file. Paths are taken from the folder in which the command runs.",
    "data-no-files": "A folder stands for the data files directly in it, and there is none.",
    "data-splits": "Training on a test split must be meant, so the splits of a folder are not read together.",
    "data-not-a-file": "Pipes and devices cannot be read twice, which resuming needs.",
    "data-unknown-kind": "The ending of the name says how a file is read; docs/data.md lists the endings.",
    "data-empty": "There is no row, or none is left after the filter and what cannot be used.",
    "data-damaged": "The file is cut off or of another kind than its name says.",
    "data-encoding": "Texts are read as UTF-8.",
    "data-bad-json": "A JSON document is read whole, so one mistake spoils it all; in JSON Lines it spoils one row.",
    "data-bad-csv": "The first line of a CSV file must name the columns.",
    "data-too-large": "The file stands for more than is held in memory at once; the message names the limit.",
    "data-columns": "A column that is needed, mapped or filtered by is in no row of the file.",
    "data-unreadable": "The system does not let dpoeng read the file.",
    "data-changed": "The file was written to while dpoeng used it. What was computed is kept: run again.",
    "data-where": "The filter is not in the language of docs/data.md.",
    "data-prompt-format": "The text around prompts must say where the prompt goes.",
    "data-one-prompt": "KTO compares a response with those to other prompts, and all rows have one prompt.",
    "data-weight": "`pair_weight_column` needs a number of at least 0 in every row that is trained on.",
    "data-rejects": "More rows than allowed cannot be used. `dpoeng check` shows the reasons with examples.",
    "model-not-found": "There is no model of this name: no folder, no GGUF file, nor one on a hub that can be reached.",
    "model-no-safetensors": "Weights are read from safetensors alone: loading a pickle can run code.",
    "model-incomplete": "A file or tensor of the checkpoint is missing. It would be random numbers otherwise.",
    "model-unexpected-tensors": "The files hold tensors of the language model that config.json denies.",
    "adapter-unsavable": "peft cannot save the adapter that was to be trained: found before the first step.",
    "model-ambiguous": "The folder holds more than one model could be: what is hashed must be what transformers loads.",
    "checkpoint-claims": "A size, a pattern or a file name in it is one that no model has.",
    "checkpoint-json": "config.json, adapter_config.json or the list of shards is damaged.",
    "model-unloadable": "transformers cannot load the folder: an unknown architecture, or files that do not fit.",
    "model-unsupported": "A probe of this architecture differs from the model's own forward, so it is refused.",
    "weights-bad": "A weight file is cut off or damaged.",
    "reference-not-finite": "The model gives NaN or infinity: damaged weights, or a dtype that is too narrow.",
    "reference-tokens": "Another trainer tokenised or truncated a pair in another way than phase one did.",
    "reference-mismatch": "Another trainer's reference is another model, adapter or precision than phase one's.",
    "reference-trainer": "`with_cached_reference` takes TRL's DPOTrainer, before it is trained.",
    "reference-drifted": "Other library versions give other numbers than the cache holds for the same reference.",
    "tokenizer-missing": "The tokenizer's files are not beside the model, or cannot be read.",
    "tokenizer-mismatch": "The tokenizer gives ids that the embedding does not have: it belongs to another model.",
    "tokenizer-no-eos": "Texts end with the end token, and the tokenizer names none.",
    "tokenizer-claims": "A tokenizer or template is larger than any, makes texts endless, or does not end on some.",
    "tokenizer-template-limits": "A chat template is a program. One that runs away is stopped at its limits.",
    "tokenizer-failed": "The tokenizer's library gave up, mostly over a pattern that can match in too many ways.",
    "tokenizer-no-template": "Messages need the SFT model's chat template.",
    "adapter-not-found": "The folder is not what peft's `save_pretrained` writes.",
    "adapter-mismatch": "The adapter was trained on another base, or is damaged. `adapter_config.json` names its base.",
    "adapter-mode": "The adapter mode does not fit the reference; docs/guide.md has the three modes.",
    "trunk-below": "Stored hidden states stand for the layers below them, which must not be trained then.",
    "trunk-unsupported": "This run, model or checkpoint cannot begin from stored hidden states.",
    "lora-no-target": "None of the module names occurs in the model; the message lists those that do.",
    "layout-unsupported": "This attention cannot run a prompt once for both responses. `auto` falls back by itself.",
    "attention-unsupported": "This way of attention cannot be used here; segments can, wherever a prompt is shared.",
    "layer-offloading-unsupported": "A trial showed that the layers cannot be run one at a time with the same bits.",
    "gguf-missing": "No such file.",
    "gguf-format": "The file is not GGUF 2 or 3, or is cut off.",
    "gguf-unsupported": "transformers does not know what this GGUF file holds.",
    "gguf-package": "An optional package is missing.",
    "weights-gguf": "An optional package is missing.",
    "gguf-output-exists": "The folder for a converted model is in use.",
    "quantization-stored": "The checkpoint is quantised in its files, and not as was asked for.",
    "gguf-quantization": "A GGUF file is quantised already.",
    "cache-not-found": "There is no reference cache in this folder. Phase one makes it.",
    "cache-not-empty": "A cache is made in an empty folder or a new one, so that nothing of yours is mixed with it.",
    "cache-format": "The file that says what the folder is cannot be read.",
    "cache-future": "The cache was written by a newer dpoeng.",
    "cache-corrupt": "A file of the cache does not match its hash. Phase one sets it aside and recomputes its rows.",
    "cache-not-plain": "Links and devices inside a cache are refused; the folder itself may be reached by a link.",
    "cache-no-trunk": "No hidden states were stored at this layer for this reference.",
    "cache-no-view": "The cache has no set of pairs of this name.",
    "cache-no-spec": "The cache is empty.",
    "cache-view-unnamed": "The cache holds several sets of pairs: say which.",
    "cache-view-name": "The name of a set of pairs becomes a file name.",
    "cache-view-exists": "Two caches have a set of pairs of the same name; only one can keep it.",
    "cache-which-spec": "The beginning of a digest must name one reference.",
    "cache-spec-in-use": "A set of pairs still uses this reference.",
    "cache-changed": "The set of pairs was rewritten by another process.",
    "cache-incomplete": "A set of pairs names a pair that has no numbers.",
    "cache-key-collision": "Two pairs have one 128-bit hash. Nothing is guessed; this is not expected to be seen.",
    "cache-disk-small": "The results will not fit on the disk. Nothing was loaded yet.",
    "cache-disk-full": "The disk is full. What was committed is kept.",
    "cache-read-only": "The cache may not be written. A complete one may be read-only.",
    "cache-disk-error": "The disk failed. What was committed is kept.",
    "cache-too-many-files": "The system's limit of open files is reached.",
    "cache-rows": "A view holds pairs or unpaired rows (one response and a label); not every command works on both.",
    "cache-sums-only": "Imported sums cannot be taken apart into tokens, which this loss weighs one by one.",
    "ranks-differ": "All processes of a run must be given the same files and settings.",
    "ranks-one-gpu": "Training in several processes needs a GPU for each.",
    "rank-lost": "Another process of the run failed: its own message says why.",
    "fsdp-unavailable": "FSDP divides a base in 4, 16 or 32 bits over processes that torchrun has started, and with "
    "`use_peft: false` the state of torch's AdamW.",
    "shard-and-ranks": "Work is divided by `--shard` or by torchrun, not by both.",
    "import-columns": "The file lacks columns that `dpoeng cache export` writes.",
    "select-nothing": "The filters of `select` leave no pair.",
    "select-exists": "A view is not replaced unasked, and never by a part of itself.",
    "select-against": "Gaps between two models need both of them on every pair.",
    "select-column": "A column to choose or group by is not there, or holds no number.",
    "import-row": "A row holds what no model can give. Nothing of the file was taken over.",
    "export-format": "The ending says the format: .jsonl or .parquet.",
    "export-trainer": "Trainers differ in what they read; no file is written that one would ignore.",
    "full-finetuning": "The option cannot be combined with training all weights (`use_peft: false`).",
    "parity-failed": "Policy and cache disagree before the first step: another model, adapter or precision.",
    "mix-reference": "One run has one reference: numbers of two cannot be mixed.",
    "mix-empty": "A set of pairs to be mixed is held out whole.",
    "loss-own-missing": "A loss of your own is found by its file or module, whose code is run.",
    "loss-own-unfit": "A loss of your own is tried on made-up pairs before anything is loaded.",
    "loss-rows": "Losses of pairs take pairs; kto, bco and apo_zero_unpaired take unpaired rows.",
    "eval-reference": "Both sets of pairs must be scored by one reference.",
    "eval-empty": "The option needs held-out pairs, and there are none.",
    "eval-changed": "Held-out pairs are found again by splitting the same pairs in the same way.",
    "eval-trained-on": "An evaluation on pairs that are trained on tells nothing about others.",
    "resume-nothing": "`--resume` asks for a checkpoint, and the folder has none.",
    "resume-changed": "The folder contains a run with other settings; going on would mix two runs.",
    "checkpoint-damaged": "A checkpoint that is needed does not match its checksum.",
    "training-not-finite": "The loss or its gradient is NaN or infinite. The newest checkpoint is from before.",
    "tracker-missing": "A tracker was named in report_to and its package is not installed. Nothing was loaded yet.",
    "tracker-failed": "A tracker could not start. One that fails later is left out with a note; the run goes on.",
    "output-unwritable": "The output folder is full, read-only, or a file.",
    "output-exists": "A file that dpoeng did not make for this purpose is replaced only where you say `--force`.",
    "output-protected": "What a command reads, and the files of a cache or a run, are never written over.",
    "output-foreign": "A run replaces `adapter/`, `model/` and its logs; here they are not those of a run.",
    "output-in-use": "Two runs in one folder would mix their metrics and checkpoints. A killed run holds nothing.",
    "run-not-found": "The folder was not written by `dpoeng train`.",
    "run-damaged": "A log of the run is damaged.",
    "sweep-combinations": "Each combination of what is varied is looked through before the first run; these are wrong.",
    "sweep-runs": "The number of combinations is the product of the numbers of values, and grows quickly.",
    "sweep-held-out": "Runs can be compared only on the same held-out pairs, and there must be some.",
    "sweep-ranks": "A sweep is one process; its runs follow each other.",
    "sweep-failed": "A run that fails does not end the others. The table of those that are complete stands above.",
    "judge-rule": "A function that judges is found by its file or module, and called with a prompt and an answer.",
    "judge-model": "A reward model is a checkpoint of transformers with one output.",
    "judge-template": "The text that a judge is asked must say where prompt and answers go.",
    "judge-verdicts": "The judge answers, and not in the form that was asked for. More replies might cost money.",
    "round-pairs": "Texts are not in the cache: they are read again from the files of phase one.",
    "endpoint-address": "An address is written into records, so it may hold no secret.",
    "endpoint-model": "A server may have several models, or not say which.",
    "endpoint-key": "The server wants a key, or another one.",
    "endpoint-refused": "The server knows no such path or model.",
    "endpoint-failed": "The server could not be reached, was busy or failed, again and again.",
    "page-unwritable": "The page's file cannot be written.",
    "no-gpu": "torch finds no CUDA device. `dpoeng doctor` says why.",
    "system-temporary-full": "Tokens of many pairs are kept in the temporary folder while phase one runs.",
    "triton-unusable": "Triton could not compile or run a kernel: mostly, a C compiler is missing.",
    "bitsandbytes-unusable": "8-bit and 4-bit need bitsandbytes. `dpoeng doctor` tries it.",
    "memory-short": "Simulated before the model is loaded: the phase would not fit. `dpoeng plan` tells more.",
    "memory-full": "The process ran out of memory.",
    "offload-room": "Hidden states that wait for their next layer have no room there. Nothing was computed yet.",
    "system-error": "The operating system refused to read or write a file.",
    "system-warning": "Libraries warn of what is to change in them; PYTHONWARNINGS=error makes each an error.",
    "internal-error": "A mistake in dpoeng.",
    "bench-no-peer": "Comparing with TRL needs a Python that has it.",
    "bench-disk-small": "The model that is measured is made on the disk first. Nothing was written yet.",
    "bench-peer-failed": "The compared process failed; its last lines are shown.",
    "bench-losses-differ": "A figure of several processes is told only if they compute what one does.",
    "demo-model": "The demo needs a small model from the hub or a package index.",
}

# The usual remedy of codes that are raised in several places, or whose remedy depends on the input.
REMEDIES: dict[str, str] = {
    "data-bad-csv": "write the file with a CSV library, column names first",
    "lora-no-target": "name modules of this model",
    "usage": "`--help` behind the command lists its options",
    "config-value": "correct the value, or leave the field out",
    "config-unknown": "write the name that the message proposes, or take the field out",
    "config-foreign": "write the field that the message names",
    "parity-failed": "train with the model, adapter and precision that the cache names, or run precompute-ref again",
    "config-missing": "name the file or model, or write it into dpoeng.yaml",
    "migrate-unreadable": "name a script (.py), or a configuration in YAML or JSON",
    "data-empty": "use a wider --where; `dpoeng check` shows why rows were left out",
    "data-missing": "check the path, or copy the whole folder again",
    "data-too-large": "write JSON Lines, one object a line, or smaller batches of fewer columns",
    "data-damaged": "write or copy the file again",
    "data-unreadable": "check its permissions and the disk",
    "data-columns": "map the columns with --columns, or rename them",
    "data-unknown-kind": "rename the file",
    "data-bad-json": "write one object a line and name the file .jsonl",
    "data-weight": "correct the row, or name another column with --pair-weight-column",
    "tokenizer-claims": "download the tokenizer again, from a source that you trust, or name another with --tokenizer",
    "model-not-found": "check the path; for a hub id, the name, the network and HF_TOKEN",
    "model-incomplete": "download or save the checkpoint again",
    "model-unloadable": "check config.json, or install a newer transformers",
    "adapter-unsavable": "use --adapter-mode continue, or merge the SFT adapter into the base first",
    "model-ambiguous": "move the adapter's files to a folder of their own and give that as --adapter",
    "model-unsupported": "please report the architecture",
    "tokenizer-missing": "copy the tokenizer files from the model that this one was trained from",
    "adapter-not-found": "name the folder that peft's `save_pretrained` wrote",
    "adapter-mismatch": "use the base that the adapter was trained on",
    "adapter-mode": "leave --adapter-mode out: auto chooses a mode that fits",
    "attention-unsupported": "leave --attention out",
    "layer-offloading-unsupported": "use --layer-offloading off, with fewer bits or a larger device",
    "offload-room": "lower --offload-gib, or name a folder on a disk with room with --offload-folder",
    "reference-tokens": "score the rows with the other trainer's tokenizer, length and end token",
    "reference-trainer": "call it once, on a constructed DPOTrainer, before train()",
    "export-trainer": "docs/other-trainers.md says what each trainer takes",
    "reference-not-finite": "use --dtype bfloat16 or float32; else the weights are damaged",
    "quantization-stored": "leave --quantization out, or name the full-precision checkpoint",
    "gguf-format": "download the file again, or give the model as safetensors",
    "bitsandbytes-unusable": "pip install 'bitsandbytes>=0.50', or use --quantization none",
    "cache-which-spec": "`dpoeng cache info` shows the references",
    "cache-disk-small": "free some space, or choose another folder with --cache",
    "cache-incomplete": "run the same `dpoeng precompute-ref` again: it computes what is missing",
    "cache-no-trunk": "run the same `dpoeng precompute-ref` again with --trunk-layer",
    "trunk-below": "name upper layers with --train-last-layers or --layers-to-transform, or use --trunk-layer 0",
    "trunk-unsupported": "leave the named option out, or use --trunk-layer 0 to run all layers",
    "cache-no-view": "name a view that is there, or run `dpoeng precompute-ref` to its end",
    "select-nothing": "widen the bounds, or keep a larger share",
    "select-exists": "choose another name, or add `--force`",
    "select-against": "run phase one with the other model on the same pairs",
    "select-column": "name a column that every row has",
    "mix-reference": "score both sets of pairs by the same reference",
    "mix-empty": "lower `--eval-share`, or name other pairs with `--eval-view`",
    "loss-own-missing": "correct the name of the file, module or function",
    "loss-own-unfit": "correct the function by what the message found",
    "loss-rows": "use one of the losses that the message lists, or name another view",
    "cache-view-unnamed": "choose one with --view",
    "cache-spec-in-use": "remove the view's file in views/ first",
    "cache-not-plain": "remove the link, or name the cache's real folder",
    "cache-format": "if dpoeng wrote this folder, write the line back that the message shows",
    "import-columns": "write these columns; from TRL: `trainer.train_dataset.to_parquet(FILE)`",
    "ranks-differ": "give every process the same command and files",
    "fsdp-unavailable": "leave --fsdp out, or start under torchrun with a supported dtype and optimizer",
    "full-finetuning": "leave the named option out",
    "eval-empty": "raise --eval-share, or name other pairs with --eval-view",
    "run-not-found": "name the --output-dir of a run",
    "output-unwritable": "free some space, or name a folder that you may write to",
    "output-exists": "name another file, or overwrite this one with --force",
    "output-protected": "name another file, or another folder with --output-dir",
    "run-damaged": "remove the line that is named; only its figures are lost",
    "sweep-runs": "vary less, or raise --max-runs",
    "sweep-held-out": "score a file of held-out pairs and name its view with --eval-view",
    "judge-rule": "correct the name or the code of the function",
    "judge-model": "name a reward model with --judge",
    "judge-template": "write {prompt}, {first} and {second} into the file of --template",
    "memory-full": "use smaller batches; `dpoeng plan` shows what fits",
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

Every mistake that you can mend is one message on stderr: what is wrong and its `[code]`, where, what was expected, what
was found, and what to do. `--debug`, anywhere in the command, adds the traceback.

```text
{EXAMPLE}```

| exit status | |
|---|---|
| 0 | done |
| 1 | a mistake in dpoeng |
| 2 | the command, the configuration, or a model that was named |
| 3 | the data (also: `dpoeng check` found an error) |
| 4 | the cache (also: `cache verify` found damage) |
| 5 | the machine: disk, memory, GPU, libraries (also: `dpoeng doctor` found an error) |
| 6 | a measurement is worse than it may be (`bench checks`) |
| 141 | nobody reads the output any more, as behind `head` |
| 130, 138, 143 | stopped by Ctrl-C, SIGUSR1 or SIGTERM; the same command goes on ([how](resume.md)) |

`make docs-errors` writes this page from the sources. A test compares it, and gives every code a wrong input.
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
    """The exit statuses with which a code is raised; where it is computed, click's own: 2."""
    found = set()
    for call in calls:
        status = argument(call, "exit_status")
        default = 4 if ast.unparse(call.func) == "CacheError" else 2
        found.add(int(str(status.value)) if isinstance(status, ast.Constant) else default)
    return sorted(found)


def remedy(code: str, calls: list[ast.Call]) -> str:
    """The usual remedy: REMEDIES', or the one literal that the sources hold."""
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
