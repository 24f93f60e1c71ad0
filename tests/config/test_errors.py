"""Wrong names and values, one a line: each gives one readable message with its remedy, and nothing is written.

No model is loaded here: a config is refused before anything else happens.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig, known_fields
from dpoeng.engine.config.files import load_config
from dpoeng.engine.config.other_trainers import meaning, releases, signatures

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = sorted(set(signatures()["names"]) - set(known_fields()))

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line that must be refused, with an optional dpoeng.yaml -> (exit status, message)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, file: str | None = None) -> tuple[int, str]:
        if file is not None:
            (tmp_path / "dpoeng.yaml").write_text(file, encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return stop.value.code, captured.err

    return call


def one_message(text: str) -> None:
    """The form of every message: one `error:`, a code, a remedy."""
    assert text.count("error: ") == 1
    assert re.search(r" \[config-[a-z]+\]\n", text)
    assert "\n  remedy:   " in text


# --------------------------------------------------------------------------- names of TRL and transformers


def test_the_table_covers_every_name_of_every_release() -> None:
    names = signatures()["names"]
    assert len(names) >= 230
    for name in names:
        assert meaning(name, fields=known_fields())
    # Spot checks against what the releases are known to have.
    assert releases("padding_value") == "TRL's DPOConfig 0.9 to 0.25; TRL's DPOTrainer 0.7 to 0.12"
    assert releases("evaluation_strategy").startswith("transformers' TrainingArguments 4.31 to 4.")
    assert releases("ld_alpha") == "TRL's DPOConfig since 0.18"


@pytest.mark.parametrize("name", [name for name in FOREIGN if name not in ("config", "debug")])  # options here
def test_a_name_of_trl_as_an_option(refused: Run, name: str) -> None:
    status, text = refused("train", f"--{name}", "1")
    assert status == 2
    one_message(text)
    assert name in text
    assert releases(name) in text
    known = meaning(name, fields=known_fields())
    assert known is not None
    assert (known.field or known.instead or known.needless or "").removeprefix("nothing: ") in text
    if known.renamed:
        assert f"renamed {known.renamed[0]} in {known.renamed[1]}" in text


def test_all_names_of_trl_in_one_file_are_answered_at_once(refused: Run) -> None:
    status, text = refused("precompute-ref", file="".join(f"{name}: 1\n" for name in FOREIGN))
    assert status == 2
    one_message(text)
    assert f"{len(FOREIGN)} fields are wrong" in text
    for line, name in enumerate(FOREIGN, 1):
        assert re.search(rf"dpoeng.yaml:{line} +{name} is not a field of dpoeng; ", text)


def test_fields_that_are_gone_say_what_to_do(refused: Run) -> None:
    status, text = refused("train", "--samples", "4", file="async_save: true\n")
    assert status == 2
    assert "samples is no longer a field of dpoeng" in text
    assert "dpoeng compare OUT" in text
    status, text = refused("train", file="async_save: true\nsamples: 4\n")
    assert status == 2
    assert "async_save is no longer a field of dpoeng; remove it" in text


def test_python_arguments_are_answered_alike() -> None:
    with pytest.raises(UserError, match="evaluation_strategy is not a field of dpoeng"):
        TrainConfig(evaluation_strategy="epoch")  # type: ignore[call-arg]
    with pytest.raises(UserError, match="beta is a field of train"):
        PrecomputeConfig(beta=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="must be a number, not true"):
        TrainConfig(beta=True)


def test_meanings_name_fields_that_exist() -> None:
    """A word in a remedy that looks like a field is one; so renaming a field cannot leave the table behind."""
    texts = [found for name in FOREIGN if (found := meaning(name, fields=known_fields()))]
    for found in texts:
        if found.field:
            assert found.field in known_fields()
        for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", found.instead or ""):
            known = word in known_fields() or word in signatures()["names"]
            assert known or word in ("lm_head", "from_pretrained", "eval_loss"), word


def test_the_page_of_versions_is_that_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from make_trl_versions import page

    assert (ROOT / "docs" / "trl-versions.md").read_text(encoding="utf-8") == page(signatures())
    for name in signatures()["names"]:
        assert f"`{name}`" in page(signatures())


def test_the_script_reads_signatures_by_the_syntax_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from make_trl_versions import dataclass_fields, spans, trainer_arguments

    tree = ast.parse(
        "class DPOTrainer:\n    def __init__(self, model=None, beta: float = 0.1, *, late=1): ...\n"
        "class DPOConfig:\n    beta: float = field(default=0.1, metadata={})\n"
        "    tools: list = field(default_factory=list)\n"
        "    _VALID: ClassVar[list] = []\n    size: int = 3\n"
    ).body
    trainer, config = tree
    assert isinstance(trainer, ast.ClassDef)
    assert isinstance(config, ast.ClassDef)
    assert list(trainer_arguments(trainer)) == [("model", "None"), ("beta", "0.1"), ("late", "1")]
    assert list(dataclass_fields(config)) == [("beta", "0.1"), ("tools", "list"), ("size", "3")]
    stretches = spans({("beta", "DPOTrainer"): {"0.7.0": "0.1", "0.7.2": "0.1", "0.8.0": "0.2"}})
    assert stretches["beta"]["DPOTrainer"]["in"] == [["0.7.0", "0.7.2"], ["0.8.0", "0.8.0"]]
    assert stretches["beta"]["DPOTrainer"]["defaults"] == [["0.7.0", "0.1"], ["0.8.0", "0.2"]]


# --------------------------------------------------------------------------- names of the other phase, and of nobody


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("precompute-ref", "--beta", ["beta is a field of train, not of precompute-ref", "dpoeng train"]),
        ("precompute-ref", "--learning-rate", ["learning_rate is a field of train"]),
        ("precompute-ref", "--output_dir", ["output_dir is a field of train"]),
        ("precompute-ref", "--lora-r", ["lora_r is a field of train"]),
        ("train", "--max-length", ["max_length is a field of precompute-ref, not of train"]),
        ("train", "--where", ["where is a field of precompute-ref"]),
        ("train", "--truncation_mode", ["truncation_mode is a field of precompute-ref"]),
        ("train", "--learning-rte", ["unknown field learning_rte", "learning_rate (train)"]),
        ("train", "--lora-rnk", ["unknown field lora_rnk", "lora_r"]),
        ("train", "--ouput_dir", ["unknown field ouput_dir", "output_dir (train)"]),
        ("precompute-ref", "--max-lenght", ["unknown field max_lenght", "max_length (precompute-ref)"]),
        ("precompute-ref", "--modle", ["unknown field modle", "model"]),
        ("precompute-ref", "--zzzz", ["unknown field zzzz", "config show"]),
        ("train", "--r", ["r is not a field of dpoeng", "write lora_r"]),
        ("train", "--target_modules", ["write lora_target_modules"]),
        ("precompute-ref", "--bnb_4bit_compute_dtype", ["write dtype"]),
    ],
)
def test_misplaced_and_misspelt_options(refused: Run, command: str, option: str, words: list[str]) -> None:
    status, text = refused(command, option, "1")
    assert status == 2
    one_message(text)
    for word in words:
        assert word in text


def test_several_unknown_options_are_reported_at_once(refused: Run) -> None:
    status, text = refused("train", "--fp16", "--padding_value=0", "--beta", "0.1", "--betta", "2")
    assert status == 2
    assert "3 fields are wrong" in text
    for word in ("dtype: float16", "without padding", "unknown field betta"):
        assert word in text


# --------------------------------------------------------------------------- values in a file


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: 5", ["must be less than 1", "was 5e-6 meant?"]),
        ("learning_rate: 0", ["must be greater than 0"]),
        ("learning_rate: -1e-5", ["must be greater than 0"]),
        ("learning_rate: fast", ["must be a number", "'fast'"]),
        ("learning_rate: .nan", ["must be a finite number"]),
        ("learning_rate: .inf", ["must be"]),
        ("learning_rate: true", ["must be a number, not true or false"]),
        ("learning_rate: [1e-5]", ["must be a number"]),
        ("beta: 0", ["must be greater than 0"]),
        ("beta: '0,1'", ["must be a number", "'0,1'"]),
        ("warmup_ratio: 10", ["a share, not a percentage: 0.1 for 10 %"]),
        ("warmup_ratio: 10%", ["must be a number"]),
        ("warmup_steps: 0.1", ["must be a whole number", "warmup_ratio: 0.1"]),
        ("warmup_steps: -1", ["must be at least 0"]),
        ("eval_share: 20", ["0.2 for 20 %"]),
        ("eval_share: 1", ["must be less than 1"]),
        ("eval_steps: 0.25", ["must be a whole number", "give a number of steps"]),
        ("eval_steps: 0", ["must be at least 1"]),
        ("save_steps: 0.5", ["give a number of steps"]),
        ("logging_steps: 0", ["must be at least 1"]),
        ("save_total_limit: 0", ["must be at least 1"]),
        ("max_reject_share: 5", ["0.05 for 5 %"]),
        ("lora_dropout: 5", ["0.05 for 5 %"]),
        ("lora_dropout: false", ["not true or false"]),
        ("lora_r: 0", ["must be at least 1"]),
        ("lora_r: 8.5", ["must be a whole number"]),
        ("lora_alpha: 0", ["must be greater than 0"]),
        ("lora_target_modules: {a: b}", ["must be a list"]),
        ("use_dora: maybe", ["must be true or false"]),
        ("init_lora_weights: pissa", ["must be"]),
        ("num_train_epochs: 0", ["must be greater than 0"]),
        ("num_train_epochs: three", ["must be a number"]),
        ("max_steps: -2", ["must be at least -1"]),
        ("max_steps: true", ["must be a number, not true or false"]),
        ("seed: -1", ["must be at least 0"]),
        ("seed: random", ["must be a whole number"]),
        ("per_device_train_batch_size: 0", ["must be at least 1"]),
        ("gradient_accumulation_steps: 0", ["must be at least 1"]),
        ("gradient_checkpointing: sometimes", ["must be true or false"]),
        ("adam_beta1: 1", ["must be less than 1"]),
        ("adam_epsilon: 0", ["must be greater than 0"]),
        ("max_grad_norm: -1", ["must be at least 0"]),
        ("lr_scheduler_type: cosin", ["must be one of 'linear'", "was cosine meant?"]),
        ("lr_scheduler_type: reduce_lr_on_plateau", ["must be one of 'linear'"]),
        ("loss_type: sigmod", ["was sigmoid meant?"]),
        ("adapter_mode: merge", ["must be one of 'auto', 'new', 'stack' or 'continue'"]),
        ("quantization: 8", ["must be one of 'none', '8bit', '4bit' or 'stored'"]),
        ("quantization: int8", ["'8bit'"]),
        ("quantization: no", ["in YAML a bare yes, no, on or off is true or false", "here none"]),
        ("dtype: bf16", ["was bfloat16 meant?"]),
        ("dtype: float8", ["must be one of 'auto'"]),
        ("attention: flex", ["must be one of 'auto'", "FlexAttention was removed"]),
        ("layout: packed", ["must be one of 'auto', 'shared' or 'separate'"]),
        ("device: gpu", ["must be auto, cpu, cuda or cuda:N"]),
        ("device: cuda:first", ["must be auto, cpu, cuda or cuda:N"]),
        ("max_length: 1", ["must be at least 2"]),
        ("max_length: 2k", ["must be a whole number", "'2k'"]),
        ("max_length: 512.5", ["must be a whole number"]),
        ("max_prompt_length: 0", ["must be at least 1"]),
        ("truncation_mode: keep_middle", ["'keep_start' or 'keep_end'"]),
        ("append_eos: perhaps", ["must be true or false"]),
        ("columns: chosen", ["must be a set of NAME: COLUMN"]),
        ("columns: {chosen: [a]}", ["must be text"]),
        ("bnb_4bit_quant_type: nf5", ["was nf4 meant?"]),
        ("batch_tokens: 0", ["must be at least 1"]),
        ("shard_tokens: many", ["must be a whole number"]),
        ("parity_pairs: 0", ["must be at least 1"]),
        ("parity_tolerance: 0", ["must be greater than 0"]),
        ("cache: [a, b]", ["must be a path"]),
        ("model: [a, b]", ["must be text"]),
        ("resume: later", ["must be true or false"]),
    ],
)
@pytest.mark.parametrize("command", ["precompute-ref", "train"])
def test_wrong_values_in_a_file(refused: Run, command: str, line: str, words: list[str]) -> None:
    """Either command tells, whichever phase the field belongs to: the file is one."""
    status, text = refused(command, file=f"# mine\n{line}\n")
    assert status == 2
    one_message(text)
    assert "where:    dpoeng.yaml:2\n" in text
    assert line.split(":")[0] in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("command", "file", "words"),
    [
        ("train", "adapter_mode: continue\nlora_r: 8\n", ["adapter_mode continue", "adapter_mode stack"]),
        ("train", "cache: here\noutput_dir: here\n", ["the same folder, here"]),
        ("train", "view: a\neval_view: a\n", ["name other pairs to evaluate on"]),
        ("precompute-ref", "max_length: 512\nmax_prompt_length: 512\n", ["leaves no room for a response"]),
        ("train", "beta: 0.1\nbeta: 0.2\n", ["beta appears twice", "lines 1 and 2"]),
        ("train", "- beta\n", ["not a set of fields", "a list"]),
        ("train", "beta\n", ["not a set of fields"]),
        ("train", "beta: [\n", ["cannot read", "dpoeng.yaml:2"]),
        ("train", "beta: 0.1\n\tseed: 1\n", ["cannot read", "dpoeng.yaml:2"]),
        ("train", "beta: !!python/object:os.system x\n", ["cannot read", "constructor"]),
        ("train", "beta: *unknown\n", ["cannot read", "alias"]),
        ("train", "{" * 1200, ["cannot read"]),
    ],
)
def test_wrong_files(refused: Run, command: str, file: str, words: list[str]) -> None:
    status, text = refused(command, file=file)
    assert status == 2
    one_message(text)
    for word in words:
        assert word in text


def test_a_file_with_many_mistakes_tells_them_all(refused: Run) -> None:
    file = "beta: -1\nlearning_rte: 1\nmodel: base\nmax_length: long\npadding_value: 0\nlora_r: 0\nquantization: 3bit\n"
    status, text = refused("train", "--config", "dpoeng.yaml", file=file)
    assert status == 2
    one_message(text)
    assert "6 fields are wrong" in text
    for line, word in ((1, "beta"), (2, "learning_rte"), (4, "max_length"), (5, "padding_value"), (6, "lora_r")):
        assert re.search(rf"dpoeng.yaml:{line}  [^\n]*{word}", text), word
    assert text.count("quantization: must be") == 1, "a field of both phases is reported once"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--beta", "high"], ["--beta", "'high'"]),
        (["train", "--beta", "0"], ["--beta", "must be greater than 0"]),
        (["train", "--learning_rate", "5"], ["--learning-rate", "5e-6"]),
        (["train", "--max-steps", "1.5"], ["--max-steps", "1.5"]),
        (["train", "--beta"], ["--beta", "argument"]),
        (["train", "--config", "none.yaml"], ["none.yaml", "No such file"]),
        (["train", "--config", "."], ["cannot read"]),
        (["train", "--adapter-mode", "merge"], ["'merge' is not one of"]),
        (["precompute-ref", "--device", "gpu"], ["must be auto, cpu, cuda or cuda:N"]),
        (["precompute-ref", "--columns", "chosen"], ["NAME=COLUMN"]),
        (["precompute-ref", "--max-length", "9", "--max-prompt-length", "9"], ["leaves no room"]),
        (["train", "pairs.jsonl"], ["unexpected extra argument"]),
    ],
)
def test_wrong_values_as_options(refused: Run, arguments: list[str], words: list[str]) -> None:
    status, text = refused(*arguments)
    assert status == 2
    for word in words:
        assert word in text


def test_a_file_that_is_not_text(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "dpoeng.yaml").write_bytes(b"beta: \xff\xfe\n")
    status, text = refused("train")
    assert status == 2
    one_message(text)


# --------------------------------------------------------------------------- what is right though it looks odd


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 5e-6", "learning_rate", 5e-6),  # text in YAML 1.1
        ("learning_rate: '5e-6'", "learning_rate", 5e-6),
        ("learning_rate: 1E-5", "learning_rate", 1e-5),
        ("seed: 010", "seed", 10),  # eight in YAML 1.1
        ("view: 2024-01-31", "view", "2024-01-31"),  # a date in YAML 1.1
        ("view: 7", "view", "7"),
        ("use_dora: 'true'", "use_dora", True),
        ("use_dora: yes", "use_dora", True),
        ("num_train_epochs: 2", "num_train_epochs", 2.0),
        ("max_steps: 10.0", "max_steps", 10),
        ("lora_target_modules: q_proj, v_proj", "lora_target_modules", ("q_proj", "v_proj")),
        ("lora_target_modules: [q_proj]", "lora_target_modules", ("q_proj",)),
        ("beta:", "beta", 0.1),  # nothing given is the default
        ("quantization: null", "quantization", None),
        ("# nothing", "beta", 0.1),
        ("\ufeffbeta: 0.2", "beta", 0.2),
    ],
)
def test_values_that_are_understood(tmp_path: Path, line: str, name: str, value: object) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(line + "\n", encoding="utf-8")
    assert getattr(load_config(TrainConfig, {}, file), name) == value


def test_an_option_resolves_a_contradiction_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("adapter_mode: continue\nlora_r: 8\n")
    assert load_config(TrainConfig, {"adapter_mode": "stack"}, file).lora_r == 8
    assert load_config(PrecomputeConfig, {}, file).model is None
