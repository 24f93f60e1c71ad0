"""`dpoeng config`, `init` and `migrate`: what they print and write, and that what they write is read back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig, known_fields
from dpoeng.engine.config.files import config_schema, load_config
from dpoeng.engine.config.template import config_text, yaml_line
from dpoeng.engine.migration.releases import TRIED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in an empty folder -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        assert "Traceback" not in captured.err
        return stop.value.code, captured.out, captured.err

    return call


# --------------------------------------------------------------------------- config show, config schema


def test_show_prints_every_field_with_its_origin(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dpoeng.yaml").write_text("model: base\n# a comment\nbeta: 0.3\nquantization: 8bit\n")
    status, out, _ = run("config", "show", "--json", "--beta", "0.5", "--max_length", "77")
    assert status == 0
    shown = json.loads(out)
    assert set(shown["precompute-ref"]) == set(PrecomputeConfig.model_fields)
    assert set(shown["train"]) == set(TrainConfig.model_fields)
    assert shown["train"]["beta"] == {"value": 0.5, "origin": "--beta"}
    assert shown["train"]["model"] == {"value": "base", "origin": "dpoeng.yaml:1"}
    assert shown["precompute-ref"]["quantization"] == {"value": "8bit", "origin": "dpoeng.yaml:4"}
    assert shown["precompute-ref"]["max_length"] == {"value": 77, "origin": "--max-length"}
    assert shown["train"]["learning_rate"] == {"value": 1e-5, "origin": "default"}
    status, out, _ = run("config", "show", "--beta", "0.5")
    assert status == 0
    for name in known_fields():
        assert f"  {name} " in out
    assert "dpoeng.yaml:1" in out
    assert "Optimisation" in out


def test_show_refuses_what_the_commands_refuse(run: Run) -> None:
    status, out, err = run("config", "show", "--padding_value", "0")
    assert (status, out) == (2, "")
    assert "without padding" in err
    status, _, err = run("config", "show", "--beta", "-1")
    assert status == 2
    assert "must be greater than 0" in err


def test_the_schema_describes_the_file(run: Run) -> None:
    status, out, _ = run("config", "schema")
    assert status == 0
    schema = json.loads(out)
    assert schema == config_schema()
    properties = schema["properties"]
    assert set(properties) == set(known_fields())
    assert schema["additionalProperties"] is False
    assert properties["beta"]["exclusiveMinimum"] == 0
    assert properties["truncation_mode"]["enum"] == ["keep_start", "keep_end"]
    assert {"type": "string"} in properties["pairs"]["anyOf"]
    for name, shape in properties.items():
        for command in known_fields()[name]:
            assert f"{command}: " in shape["description"]


# --------------------------------------------------------------------------- init


def test_init_writes_a_file_in_which_nothing_but_the_given_is_set(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    status, out, _ = run("init", "pairs.jsonl", "--model", "org/name", "--adapter", "org/sft")
    assert status == 0
    assert "dpoeng precompute-ref\n  dpoeng train" in out
    file = tmp_path / "dpoeng.yaml"
    scored = load_config(PrecomputeConfig, {}, file)
    assert scored == PrecomputeConfig(pairs=(Path("pairs.jsonl"),), model="org/name", adapter="org/sft")
    trained = load_config(TrainConfig, {}, file)
    assert trained == TrainConfig(model="org/name", adapter="org/sft", adapter_mode="continue")


def test_every_commented_field_of_init_shows_its_default(run: Run, tmp_path: Path) -> None:
    assert run("init")[0] == 0
    text = (tmp_path / "dpoeng.yaml").read_text()
    assert yaml.safe_load(text) is None, "without arguments everything is a comment"
    names = known_fields()
    fields = [line[2:] for line in text.splitlines() if line.startswith("# ") and line[2:].split(":")[0] in names]
    assert [field.split(":")[0] for field in fields] == list(names)
    (tmp_path / "all.yaml").write_text("\n".join(fields))
    assert load_config(PrecomputeConfig, {}, tmp_path / "all.yaml") == PrecomputeConfig()
    trained = load_config(TrainConfig, {}, tmp_path / "all.yaml")
    # What both phases have stands once, with phase one's default; for train that is the reference's own.
    shared = {name: getattr(PrecomputeConfig(), name) for name in names if len(names[name]) == 2}
    assert trained == TrainConfig(**{k: v for k, v in shared.items() if v is not None})
    for line in text.splitlines():
        assert len(line) <= 120


@pytest.mark.parametrize(
    ("gpu", "kind", "words"),
    [
        ("a100-80gb", "none", "of the 79.1 GiB of a100-80gb"),
        ("1.9gib", "8bit", "calculated by dpoeng plan: at least 1.42"),
        ("1gib", "4bit", "this will not fit"),
    ],
)
def test_init_chooses_a_quantization_by_the_plan(run: Run, tmp_path: Path, gpu: str, kind: str, words: str) -> None:
    """From config.json alone; and what init writes is what plan would say of it."""
    fields = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 2048,
        "intermediate_size": 24576,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    status, out, err = run("init", "--model", "./model", "--gpu", gpu)
    assert status == 0, err
    assert f"quantization: {kind}" in out
    assert words in " ".join(out.split())
    scored = load_config(PrecomputeConfig, {}, tmp_path / "dpoeng.yaml")
    trained = load_config(TrainConfig, {}, tmp_path / "dpoeng.yaml")
    assert scored.quantization == kind
    if kind != "8bit":
        return
    request = ["--gpu", gpu, "--quantization", kind, "--max-length", "1024", "--no-compare", "--json"]
    _, out, _ = run("plan", "--model", "./model", *request)
    planned = json.loads(out)["phase2"]["suggested"]
    assert trained.per_device_train_batch_size == planned["per_device_train_batch_size"]
    assert trained.gradient_accumulation_steps == planned["gradient_accumulation_steps"]
    assert (scored.batch_tokens or 16384) == planned["batch_tokens"]


def test_init_leaves_open_what_it_cannot_know(run: Run, tmp_path: Path) -> None:
    status, out, err = run("init", "--model", "org/unheard-of", "--gpu", "24gb")
    assert status == 0, err
    assert "the size of org/unheard-of is unknown" in " ".join(err.split())
    assert "quantization" not in out
    assert load_config(PrecomputeConfig, {}, tmp_path / "dpoeng.yaml") == PrecomputeConfig(model="org/unheard-of")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init", "none.jsonl"], ["none.jsonl does not exist"]),
        (["init", "--model", "./none"], ["./none does not exist", "--model"]),
        (["init", "--adapter", "./none"], ["./none does not exist", "--adapter"]),
        (["init", "--output", "none/dpoeng.yaml"], ["cannot be written", "no folder none"]),
        (["init", "--gpu", "abacus"], ["unknown card abacus", "--gpu", "a100-80gb"]),
        (["migrate", "none.py"], ["cannot read", "No such file"]),
        (["migrate", "."], ["cannot read"]),
        (["migrate", "empty.py"], ["no DPO settings in this file", "dpoeng init"]),
        (["migrate", "bad.py"], ["cannot read the script", "bad.py:1"]),
        (["migrate", "bad.json"], ["cannot read the script or configuration"]),
        (["migrate", "list.yaml"], ["cannot read the script or configuration", "a list"]),
        (["migrate", "bytes.py"], ["cannot read"]),
        (["migrate", "run.ipynb"], ["cannot read the script or configuration", "nbconvert --to script"]),
        (["migrate", "good.py", "--output", "none/x.yaml"], ["cannot be written"]),
        (["config", "sho"], ["No such command 'sho'"]),
    ],
)
def test_mistakes_write_nothing(run: Run, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "empty.py").write_text("print('hello')\n")
    (tmp_path / "bad.py").write_text("DPOConfig(beta=\n")
    (tmp_path / "bad.json").write_text('{"beta": ')
    (tmp_path / "list.yaml").write_text("- beta\n")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "run.ipynb").write_text("{}")
    (tmp_path / "good.py").write_text("DPOConfig(beta=0.2)\n")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    for word in words:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [["init"], ["migrate", "good.py"]])
def test_nothing_is_overwritten_without_force(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "good.py").write_text("DPOConfig(beta=0.2)\n")
    (tmp_path / "dpoeng.yaml").write_text("beta: 0.7\n")
    status, _, err = run(*command)
    assert status == 2
    assert "dpoeng.yaml already exists" in err
    assert "--force" in err
    assert (tmp_path / "dpoeng.yaml").read_text() == "beta: 0.7\n"
    assert run(*command, "--force")[0] == 0
    assert (tmp_path / "dpoeng.yaml").read_text() != "beta: 0.7\n"


@pytest.mark.parametrize(
    "value", ["no", "1e5", "a: b", "# x", "", "ä 'quoted'", 1e-6, 3, True, ["q_proj", "no"], "null", "~"]
)
def test_values_are_written_as_they_are_read(tmp_path: Path, value: Any) -> None:
    assert yaml.safe_load(yaml_line("name", value)) == {"name": value}


# --------------------------------------------------------------------------- migrate

# The three calls that failed for the user for whom dpoeng is made, as they were.
CALLS = """
from trl import DPOTrainer
from transformers import AutoModelForCausalLM, TrainingArguments
from datasets import load_dataset
from peft import LoraConfig

model = AutoModelForCausalLM.from_pretrained("MODEL")

# TypeError: TrainingArguments.__init__() got an unexpected keyword argument 'evaluation_strategy'
training_args = TrainingArguments(
    output_dir="dpo-out",
    evaluation_strategy="no",
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    max_steps=3,
    report_to="none",
)
# TypeError: DPOTrainer.__init__() got an unexpected keyword argument 'beta'
# AttributeError: 'TrainingArguments' object has no attribute 'padding_value'
trainer = DPOTrainer(
    model,
    None,
    args=training_args,
    beta=0.2,
    max_length=256,
    train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
    tokenizer=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
"""


def test_the_three_failing_calls_become_a_config_that_trains(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    from dpoeng_testing import pair_rows, write_jsonl

    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    shutil.copytree(tiny_model, tmp_path / "sft")
    (tmp_path / "train.py").write_text(CALLS.replace("MODEL", "sft"))
    status, out, err = run("migrate", "train.py")
    assert status == 0, err
    assert "evaluation_strategy: TrainingArguments accepted it up to 4.50.0; now eval_strategy" in out
    assert "beta: DPOTrainer accepted it up to 0.12; now an argument of DPOConfig" in out
    assert "'TrainingArguments' object has no attribute 'padding_value'" in out
    assert "it fits TRL 0.7 to 0.8 with transformers 4.31.0 to 4.50.0" in out
    assert "No equivalent" not in out
    config = load_config(TrainConfig, {})
    assert (config.beta, config.max_steps, config.lora_r, config.lora_alpha) == (0.2, 3, 4, 8)
    assert config.lora_target_modules == ("q_proj", "v_proj")
    assert (config.eval_share, config.gradient_accumulation_steps, config.warmup_ratio) == (0.0, 1, 0.0)
    assert load_config(PrecomputeConfig, {}).max_length == 256
    assert run("precompute-ref")[0] == 0
    status, out, err = run("train")
    assert status == 0, err
    assert (tmp_path / "dpo-out" / "adapter" / "adapter_model.safetensors").is_file()
    first = json.loads((tmp_path / "dpo-out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)


REQUEST = """
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import DPOConfig, DPOTrainer

base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-32B", load_in_8bit=True)
model = PeftModel.from_pretrained(base, "my-sft-lora", is_trainable=True)
training_args = ARGS(output_dir="dpo-out", evaluation_strategy="no", per_device_train_batch_size=1)
trainer = DPOTrainer(model, None, args=training_args, beta=0.1, tokenizer=tokenizer,
                     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"))
"""


@pytest.mark.parametrize("arguments", ["DPOConfig", "TrainingArguments"])
def test_the_releases_follow_what_is_imported(run: Run, tmp_path: Path, arguments: str) -> None:
    """DPOConfig came with 0.9 and `tokenizer` went after 0.11: 0.8 would end in an ImportError, 1.16 in a TypeError."""
    written, out = migrated(run, tmp_path, "train.py", REQUEST.replace("ARGS", arguments))
    fits = "it fits TRL 0.9 to 0.11 with transformers 4.40.0 to 4.50.0; TRL 0.11.4 was tested with transformers 4.45.2"
    assert fits in out
    assert ("no release accepts all of it; with DPOConfig instead" in out) == (arguments == "TrainingArguments")
    assert written["learning_rate"] == 5e-5, "1e-6 came with TRL 0.12"
    assert written["truncation_mode"] == "keep_end", "keep_start came with 0.29"
    assert "max_length: not set there, and TRL 0.9 has no fixed default" in out


def test_defaults_are_those_of_the_release(run: Run, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("DPOTrainer(m, beta=0.1, args=DPOConfig(evaluation_strategy='no'))\n")
    _, out, _ = run("migrate", "train.py")
    assert "learning_rate: 5e-05 is the default of TRL 0.9, 1e-06 that of 0.12" in out
    for release, rate in (("0.11.4", 5e-5), ("0.12.1", 1e-6), ("1.16.0", 1e-6)):
        status, out, _ = run("migrate", "train.py", "--force", "--trl-version", release)
        assert status == 0
        assert "The script fits both" not in out
        assert yaml.safe_load((tmp_path / "dpoeng.yaml").read_text())["learning_rate"] == rate
    (tmp_path / "dpo.yml").write_text(AXOLOTL)
    assert "--trl-version: not used" in run("migrate", "dpo.yml", "--force", "--trl-version", "0.11.4")[1]
    for wrong in ("0.6", "2.0", "newest"):
        status, _, err = run("migrate", "train.py", "--force", "--trl-version", wrong)
        assert status == 2
        assert "a release from 0.7.0 to 1.16.0" in err


def test_pairs_of_releases_that_were_tried_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| [a-z]", page, re.MULTILINE)
    assert tuple(rows) == TRIED


def migrated(run: Run, tmp_path: Path, name: str, text: str) -> tuple[dict[str, Any], str]:
    """Migrates a file; what is written is read by both phases -> (fields of the file, what was printed)."""
    (tmp_path / name).write_text(text)
    status, out, err = run("migrate", name, "--force")
    assert status == 0, err
    for cls in (PrecomputeConfig, TrainConfig):
        load_config(cls, {}, tmp_path / "dpoeng.yaml")
    written: dict[str, Any] = yaml.safe_load((tmp_path / "dpoeng.yaml").read_text())
    return written, out


@pytest.mark.parametrize(
    ("text", "fields", "words"),
    [
        # 0.7 to 0.12: everything on the trainer
        ("DPOTrainer(m, None, beta=0.3, max_prompt_length=100)", {"beta": 0.3, "max_prompt_length": 100}, []),
        ("DPOTrainer(model='org/m', args=DPOConfig(beta=0.3))", {"model": "org/m", "beta": 0.3}, []),
        # today
        ("DPOConfig('out', beta=0.3, loss_type=['sigmoid'])", {"output_dir": "out", "loss_type": ["sigmoid"]}, []),
        ("DPOConfig()", {"learning_rate": 1e-6, "per_device_train_batch_size": 8, "eval_share": 0.0}, []),
        ("TrainingArguments()", {"learning_rate": 5e-5, "gradient_accumulation_steps": 1}, []),
        # values through variables, dictionaries, argparse, dataclasses
        ("B = 0.3\nDPOConfig(beta=B)", {"beta": 0.3}, []),
        ("kw = dict(beta=0.3)\nDPOConfig(**kw)", {"beta": 0.3}, []),
        ("kw = {'beta': 0.3, 'seed': 1}\nDPOConfig(**kw)", {"beta": 0.3, "seed": 1}, []),
        (
            "p.add_argument('-b', '--beta', default=0.3)\nDPOConfig(beta=args.beta)",
            {"beta": 0.3},
            ["beta: defaults of the script's command-line arguments"],
        ),
        (
            "p.add_argument('--beta', required=True)\nDPOConfig(beta=args.beta)",
            {},
            ["beta: computed when the script runs"],
        ),
        ("class S:\n    beta: float = field(default=0.3)\nDPOConfig(beta=s.beta)", {"beta": 0.3}, []),
        ("R = 'runs'\nDPOConfig(output_dir=f'{R}/a')", {"output_dir": "runs/a"}, []),
        # computed: said, never guessed
        ("DPOConfig(beta=best_beta())", {}, ["line 1, beta: computed when the script runs (best_beta())"]),
        ("B = 0.1\nB = 0.2\nDPOConfig(beta=B)", {}, ["beta: computed when the script runs (B)"]),
        ("DPOConfig(**load())", {}, ["**load(): computed"]),
        # another unit, another spelling
        ("DPOConfig(warmup_steps=0.1)", {"warmup_ratio": 0.1}, []),
        ("DPOConfig(bf16=True)", {"dtype": "bfloat16"}, []),
        (
            "DPOConfig(eval_strategy='steps', eval_steps=50)",
            {"eval_steps": 50, "eval_share": None},
            ["No evaluation pairs found"],
        ),
        ("DPOConfig(eval_steps=50)", {"eval_steps": None, "eval_share": 0.0}, ["Not needed here: eval_steps"]),
        ("DPOConfig(eval_strategy='steps', eval_steps=0.5)", {}, ["eval_steps 0.5: must be a whole number"]),
        ("DPOConfig(eval_strategy='epoch')", {"eval_share": None}, ["once per epoch"]),
        ("DPOConfig(loss_type=['sigmoid', 'sft'], loss_weights=[1, 0.2])", {"loss_weights": [1, 0.2]}, []),
        ("DPOConfig(loss_type='kto_pair')", {}, ["kto_pair"]),
        ("DPOConfig(load_best_model_at_end=True)", {"load_best_model_at_end": True, "eval_share": None}, []),
        ("DPOConfig(use_cpu=True)", {"device": "cpu"}, []),
        ("DPOConfig(resume_from_checkpoint=True)", {"resume": True}, []),
        ("BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='fp4')\nDPOConfig()", {"quantization": "4bit"}, []),
        ("LoraConfig(r=64)\nDPOConfig()", {"lora_r": 64, "lora_alpha": 8}, ["without target_modules"]),
        ("LoraConfig(target_modules='all-linear')\nDPOConfig()", {"lora_target_modules": ["all-linear"]}, []),
        # 0.25 asks for transformers 4.56.1 or newer; eval_strategy was there from 4.41, evaluation_strategy to 4.50
        ("DPOConfig(padding_value=0, loss_weights=[1])", {}, ["it fits TRL 0.20 to 0.25 with transformers 4.57.1"]),
        ("DPOConfig(evaluation_strategy='no', ld_alpha=1)", {}, ["it fits TRL 0.18 with transformers 4.50.0)"]),
        ("DPOConfig(evaluation_strategy='no', loss_weights=[1])", {}, ["no release accepts all of it"]),
        ("DPOTrainer(m, beta=0.1, processing_class=t, label_smoothing=0)", {}, ["it fits TRL 0.12 with"]),
        ("DPOTrainer(m, beta=0.1, args=DPOConfig(eval_strategy='no', loss_weights=[1]))", {}, ["no release accepts"]),
        # no equivalent
        ("DPOConfig(sync_ref_model=True)", {}, ["sync_ref_model: True", "cannot be cached"]),
        ("DPOConfig(fsdp='full_shard auto_wrap')", {"fsdp": True}, []),
        ("DPOConfig(deepspeed='z3.json')", {}, ["deepspeed: 'z3.json'"]),
        ("DPOConfig(report_to='wandb')", {"report_to": "wandb"}, []),
        ("DPOConfig(report_to='swanlab')", {}, ["report_to 'swanlab': must be one of"]),
        ("DPOConfig(report_to='none')", {}, ["Not needed here: report_to"]),
        ("DPOConfig(padding_value=0)", {}, ["padding_value: DPOConfig accepted it up to 0.25", "Not needed here"]),
        ("DPOConfig(max_length=None)", {}, ["always has a limit"]),
        ("DPOConfig(save_total_limit=0)", {}, ["save_total_limit 0: must be at least 1"]),
        ("DPOConfig(nonsense=1)", {}, ["nonsense: unknown", "DPOConfig never accepted it"]),
        ("DPOTrainer(m, ref_model='other', args=DPOConfig())", {}, ["is not where the policy starts"]),
        ("DPOTrainer('m', ref_model='m')", {"model": "m"}, ["Not needed here: ref_model"]),
        # what is trained
        ("DPOTrainer('m')", {"use_peft": False}, []),
        ("DPOTrainer('m', peft_config=LoraConfig(r=4))", {"use_peft": None, "lora_r": 4}, []),
        ("DPOTrainer('m', peft_config=made())", {"use_peft": None}, ["peft_config: computed"]),
        ("DPOTrainer(build(), args=DPOConfig())", {"use_peft": None}, ["use_peft: false if TRL trained"]),
        ("ModelConfig(use_peft=False, lora_r=8)", {"use_peft": False, "lora_r": None}, ["Not needed here: lora_r"]),
        ("ModelConfig(use_peft=True, lora_r=8)", {"use_peft": True, "lora_r": 8}, []),
        # models and data
        (
            "b = AutoModelForCausalLM.from_pretrained('base')\nm = PeftModel.from_pretrained(b, 'sft')\nDPOTrainer(m)",
            {"model": "base", "adapter": "sft", "adapter_mode": "continue"},
            ["reference is base + adapter"],
        ),
        (
            "b = AutoModelForCausalLM.from_pretrained('base')\nb = PeftModel.from_pretrained(b, 'sft')\n"
            "DPOTrainer(b, peft_config=LoraConfig(r=4))",
            {"adapter": "sft", "adapter_mode": "stack", "lora_r": 4},
            ["older releases of TRL merged the adapter into the base"],
        ),
        (
            "b = AutoModelForCausalLM.from_pretrained('base')\nm = PeftModel.from_pretrained(b, 'sft')\n"
            "DPOTrainer(m, ref_model=b)",
            {"adapter": "sft"},
            ["ref_model: 'base' is the base without the SFT adapter"],
        ),
        (
            "b = AutoModelForCausalLM.from_pretrained('base')\nm = PeftModel.from_pretrained(b, 'sft')\n"
            "r = PeftModel.from_pretrained(b, 'sft')\nDPOTrainer(m, ref_model=r)",
            {"adapter": "sft", "adapter_mode": "continue"},
            ["Not needed here: ref_model"],
        ),
        ("m = AutoPeftModelForCausalLM.from_pretrained('sft')\nDPOTrainer(m)", {"adapter": "sft"}, ["set model"]),
        ("DPOTrainer(build())", {}, ["model: computed when the script runs (build())"]),
        (
            "d = load_dataset('json', data_files={'train': 'a.jsonl', 'test': 'b.jsonl'})\n"
            "DPOTrainer('m', train_dataset=d['train'], eval_dataset=d['test'])",
            {"pairs": ["a.jsonl"], "eval_view": "eval"},
            ["  dpoeng precompute-ref b.jsonl --name eval\n  dpoeng train"],
        ),
        (
            "d = load_dataset('json', data_files='a.jsonl', split='train').filter(ok).train_test_split(test_size=0.2)\n"
            "DPOTrainer('m', train_dataset=d['train'], eval_dataset=d['test'])",
            {"pairs": ["a.jsonl"], "eval_share": 0.2, "eval_view": None},
            ["changed in code, .filter(ok)", "Next:\n  dpoeng precompute-ref\n  dpoeng train\n"],
        ),
        (
            "d = load_dataset('json', data_files='a.jsonl', split='train').train_test_split(20)\n"
            "DPOTrainer('m', train_dataset=d['train'], eval_dataset=d['test'])",
            {"pairs": ["a.jsonl"], "eval_view": None},
            ["eval_share: 20 rows; set eval_share to a share of the prompts"],
        ),
        ("DPOTrainer('m', train_dataset=load_dataset('org/d'))", {}, ["to_json('pairs.jsonl')"]),
        (
            "d = load_dataset('org/d')\nDPOTrainer('m', train_dataset=d['train'], eval_dataset=d['test'])",
            {"eval_share": None},
            ["line 1, eval_dataset: save its part of 'org/d' too"],
        ),
        (
            "DPOTrainer('m', train_dataset=load_dataset('json', data_files='a.jsonl', split='train[:9]'),\n"
            "  eval_dataset=load_dataset('json', data_files='a.jsonl', split='train[9:]'))",
            {"pairs": ["a.jsonl"], "eval_view": None},
            ["eval_dataset: from the same file as the training pairs"],
        ),
        (
            "d = load_dataset('json', data_files='a.jsonl').map(fix)\nDPOTrainer('m', train_dataset=d)",
            {"pairs": ["a.jsonl"]},
            ["changed in code, .map(fix)"],
        ),
    ],
)
def test_trl_scripts(run: Run, tmp_path: Path, text: str, fields: dict[str, Any], words: list[str]) -> None:
    written, out = migrated(run, tmp_path, "train.py", text)
    assert {name: written.get(name) for name in fields} == fields
    for word in words:
        assert word in out


def grown(step: str, times: int) -> str:
    """Variables that are each made of the one before, several times."""
    chain = "".join(f"x{i} = {step.format(f'x{i - 1}')}\n" for i in range(1, times))
    return f"x0 = 'a'\n{chain}DPOTrainer(model=x{times - 1})\n"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (grown("{0}.map({0})", 60), "model: computed"),
        (grown("[" + "{0}, " * 40 + "]", 19), "model: computed"),
        (grown("f'" + "{{{0}}}" * 40 + "'", 19), "model: computed"),
        ("x = x\ny = [y]\nDPOTrainer(model=[x, y])\n", "model: computed"),
        ("DPOTrainer(model=m" + ".a" * 5000 + ")\n", "cannot read the script"),
        ("DPOTrainer(model=" + "+".join(["a"] * 50_000) + ")\n", "cannot read the script"),
    ],
    ids=["objects", "lists", "texts", "itself", "deep", "long"],
)
def test_a_script_that_grows_is_read_in_a_moment(run: Run, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "train.py").write_text(text)
    _, out, err = run("migrate", "train.py")
    assert word in out + err


def test_a_script_is_never_run(run: Run, tmp_path: Path) -> None:
    text = "import os\nos.makedirs('made')\nraise SystemExit('ran')\nDPOConfig(beta=__import__('os').getpid())\n"
    _, out = migrated(run, tmp_path, "train.py", text)
    assert "beta: computed" in out
    assert not (tmp_path / "made").exists()


def test_a_data_set_is_reported_once(run: Run, tmp_path: Path) -> None:
    _, out = migrated(run, tmp_path, "train.py", "DPOTrainer('m', train_dataset=load_dataset('org/d', split='train'))")
    assert out.count("org/d") == 2, "its name, and the call that saves it"


def test_the_note_about_the_reference_needs_a_missing_ref_model(run: Run, tmp_path: Path) -> None:
    load = "b = AutoModelForCausalLM.from_pretrained('base')\nm = PeftModel.from_pretrained(b, 'sft')\n"
    _, out = migrated(run, tmp_path, "train.py", f"{load}DPOTrainer(m, ref_model=b)")
    assert "no ref_model" not in out
    _, out = migrated(run, tmp_path, "train.py", f"{load}DPOTrainer(m)")
    assert "With a PeftModel and no ref_model" in out


def test_a_paste(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("    trainer = DPOTrainer(model, beta=0.4)\n"))
    status, out, _ = run("migrate", "-", "--output", "-")
    assert status == 0
    assert yaml.safe_load(out)["beta"] == 0.4


def test_a_dpo_config_in_json_and_yaml(run: Run, tmp_path: Path) -> None:
    settings = {"beta": 0.3, "model_name_or_path": "org/m", "load_in_8bit": True, "tokenizer": "x", "lora_r": 4}
    for name, text in (("c.json", json.dumps(settings)), ("c.yaml", yaml.safe_dump(settings))):
        written, out = migrated(run, tmp_path, name, text)
        assert (written["beta"], written["model"], written["quantization"]) == (0.3, "org/m", "8bit")
        assert written["learning_rate"] == 1e-6, "DPOConfig's default, which is not dpoeng's"
        assert "a DPOConfig of TRL" in out


def test_conflicting_fields_are_reported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("DPOConfig(load_best_model_at_end=True, eval_strategy='no')\n")
    status, out, _ = run("migrate", "train.py")
    assert status == 0
    assert "together: load_best_model_at_end needs held-out pairs" in out


AXOLOTL = """
base_model: org/base
load_in_8bit: true
adapter: lora
rl: dpo
rl_beta: 0.05
datasets:
  - path: data/pairs.jsonl
    ds_type: json
    type: chatml.intel
  - path: org/hub-set
    split: train
val_set_size: 0.05
sequence_len: 2048
sample_packing: false
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
lora_r: 32
lora_alpha: 16
lora_target_linear: true
bf16: auto
warmup_steps: 10
flash_attention: true
output_dir: ./out
made_up: 3
"""


def test_axolotl(run: Run, tmp_path: Path) -> None:
    written, out = migrated(run, tmp_path, "dpo.yml", AXOLOTL)
    assert written == {
        "pairs": ["data/pairs.jsonl"],
        "model": "org/base",
        "quantization": "8bit",
        "dtype": "bfloat16",
        "max_length": 2048,
        "eval_share": 0.05,
        "output_dir": "./out",
        "lora_r": 32,
        "lora_alpha": 16,
        "beta": 0.05,
        "learning_rate": 0.0002,
        "optim": "adamw_bnb_8bit",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    }
    for word in (
        "data set 'org/hub-set': save it",
        "made_up: unknown",
        "chatml.intel",
    ):
        assert word in out
    written, out = migrated(run, tmp_path, "kto.yml", "base_model: m\nrl: kto\n")
    assert written["use_peft"] is False
    assert "rl: 'kto'; dpoeng only supports dpo" in out


def test_llama_factory(run: Run, tmp_path: Path) -> None:
    text = (
        "model_name_or_path: org/base\nstage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_rank: 4\n"
        "lora_target: all\npref_beta: 0.2\npref_loss: sigmoid\ndataset: dpo_en_demo\ntemplate: llama3\n"
        "cutoff_len: 512\nquantization_bit: 4\nper_device_train_batch_size: 1\nlearning_rate: 5.0e-6\n"
        "bf16: true\nval_size: 0.1\noutput_dir: saves/dpo\nplot_loss: true\n"
    )
    written, out = migrated(run, tmp_path, "dpo.yaml", text)
    assert written == {
        "model": "org/base",
        "quantization": "4bit",
        "dtype": "bfloat16",
        "max_length": 512,
        "eval_share": 0.1,
        "output_dir": "saves/dpo",
        "lora_r": 4,
        "lora_alpha": 8,  # twice the rank, as there
        "lora_target_modules": ["all-linear"],
        "loss_type": "sigmoid",
        "beta": 0.2,
        "learning_rate": 5e-6,
        "warmup_ratio": 0.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    assert "dataset_info.json names its file" in out
    assert "template: 'llama3'" in out
    whole = text.replace("finetuning_type: lora", "finetuning_type: full").replace("quantization_bit: 4\n", "")
    written, _ = migrated(run, tmp_path, "a.yaml", whole)
    assert (written["use_peft"], [name for name in written if name.startswith("lora")]) == (False, [])
    written, _ = migrated(run, tmp_path, "a.yaml", text + "adapter_name_or_path: sft\ncreate_new_adapter: true\n")
    assert (written["adapter"], written["adapter_mode"], written["lora_r"]) == ("sft", "stack", 4)
    written, out = migrated(run, tmp_path, "a.yaml", text + "adapter_name_or_path: sft\n")
    assert (written["adapter_mode"], "lora_r" in written) == ("continue", False)
    assert "lora_r: the SFT adapter keeps its own shape when it is trained further" in out


def test_the_writer_can_be_read_by_a_person() -> None:
    text = config_text({}, header=["Top."], every_field=True)
    assert text.startswith("# Top.\n")
    assert "# ---- Loss (phase two, dpoeng train)" in text
    assert "# Peak learning rate of AdamW.\n# learning_rate: 1.0e-05\n" in text


def test_help_is_grouped_as_the_file_is() -> None:
    import click

    from dpoeng.cli.main import dpoeng
    from dpoeng.engine.config.fields import COMMANDS
    from dpoeng.engine.config.template import sections

    for command, cls in COMMANDS.items():
        found = dpoeng.get_command(click.Context(dpoeng), command)
        assert found is not None
        context = click.Context(found, info_name=command)
        context.meta["dpoeng.help_all"] = True
        text = found.get_help(context)
        places = [text.index(f"\n{heading}:\n") for heading, names in sections(command) if names != ["pairs"]]
        assert places == sorted(places)
        loss = text[text.index("\nLoss:\n") :] if command == "train" else ""
        assert not loss or loss.index("--beta ") < loss.index("\n\n")
        assert sum(len(names) for _, names in sections(command)) == len(cls.model_fields)
