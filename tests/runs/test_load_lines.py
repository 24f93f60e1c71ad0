"""The lines that load a result: printed, run as they are, and the model has the log-probs that training ended with."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, write_jsonl

from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.inputs import open_inputs
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.runs.load_lines import Loading, Place, loading_lines

# What differs in the lines: whether an adapter lies below, what holds the base, the dtype, and all weights. The
# tolerance is that of the sums of some 30 tokens, in nats: of float32, of bfloat16, and of another 8-bit product.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "float32": ({}, {}, 1e-3),
    "bfloat16": ({"dtype": "bfloat16"}, {}, 0.6),
    "8bit-continued": ({"quantization": "8bit", "adapter": True}, {"adapter_mode": "continue"}, 0.6),
    "stacked": ({"adapter": True}, {"adapter_mode": "stack"}, 1e-3),
    "4bit": ({"quantization": "4bit", "bnb_4bit_use_double_quant": False}, {}, 0.6),
    "full": ({}, {"use_peft": False, "learning_rate": 3e-3}, 1e-3),
}


def log_probs(model: Any, rows: Any) -> list[float]:
    """Sum over each chosen response, by a plain forward."""
    sums = []
    for row in rows:
        ids = torch.tensor([*row.ids.prompt_ids.tolist(), *row.ids.chosen_ids.tolist()])
        with torch.inference_mode():
            logits = model(ids[None].to(model.device)).logits[0].double().log_softmax(-1)
        begin = len(row.ids.prompt_ids)
        sums.append(float(logits[begin - 1 : -1].gather(1, ids[begin:, None]).sum()))
    return sums


@pytest.mark.parametrize("case", CASES)
def test_the_printed_lines_load_the_trained_policy(
    case: str,
    tmp_path: Path,
    tiny_model: Path,
    sft_adapter: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    phase_one, phase_two, tolerance = CASES[case]
    monkeypatch.chdir(tmp_path)
    if case == "4bit":  # bitsandbytes' own layers want whole blocks of 64 in a row
        tiny_model = save_tiny_model(tmp_path / "wider", tokenizer, hidden=64)
    Path("model").symlink_to(tiny_model)  # a relative name, which means nothing elsewhere
    Path("sft").symlink_to(sft_adapter)
    pairs, fields = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16)), dict(phase_one)
    adapter = "sft" if fields.pop("adapter", False) else None
    precompute_reference(
        PrecomputeConfig(pairs=(pairs,), model="model", adapter=adapter, cache=Path("cache"), **fields)
    )
    settings = {"learning_rate": 3e-2, "max_steps": 3, "eval_share": 0.3, **phase_two}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "use_peft"]
    words += ["--no-use-peft"] if phase_two.get("use_peft") is False else []
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--cache", "cache", "--output-dir", "out", *words])
    assert stop.value.code == 0
    said = capsys.readouterr().out

    run = json.loads(Path("out/run.json").read_text())
    printed = said[said.index("Load it with:\n") :].split("\n", 1)[1]
    printed = textwrap.dedent("".join(line for line in printed.splitlines(True) if line.startswith("  ")))
    assert printed.splitlines() == run["load"]
    folder = "model" if case == "full" else "adapter"
    card = re.search(r"```python\n(.*?)```", Path("out", folder, "README.md").read_text(), re.DOTALL)
    assert card is not None

    held_out = open_inputs(TrainConfig(cache=Path("cache"), eval_share=0.3)).held_out.rows
    trained = [json.loads(line)["logps/chosen"] for line in Path("out/held_out.jsonl").read_text().splitlines()]
    cached = [row.chosen_sum for row in held_out]
    for lines, place in ((printed, "/"), (card[1], "out")):
        monkeypatch.chdir(tmp_path / place)
        names: dict[str, Any] = {}
        exec(lines, names)
        found = log_probs(names["model"], held_out)
        assert found == pytest.approx(trained, abs=tolerance)
        assert max(abs(one - other) for one, other in zip(found, cached, strict=True)) > 4 * tolerance
        assert names["tokenizer"].chat_template
        assert getattr(names["model"], "is_loaded_in_8bit", False) == (case == "8bit-continued")
        assert getattr(names["model"], "is_loaded_in_4bit", False) == (case == "4bit")


def test_lines_for_the_hub_and_for_a_quantised_base() -> None:
    base = Place("org/base", revision="abc")
    lines = loading_lines(Loading("new", "AutoModelForCausalLM", base, "bfloat16", tokenizer=False))
    assert "'org/base', revision='abc', dtype='bfloat16', device_map='auto'" in lines[2]
    assert "tokenizer" not in "".join(lines).lower()
    four = loading_lines(Loading("new", "AutoModelForCausalLM", base, "bfloat16", "4bit", "fp4", False))
    assert "bnb_4bit_quant_type='fp4', bnb_4bit_use_double_quant=False" in "".join(four)
    gguf = loading_lines(Loading("new", "AutoModelForCausalLM", Place("/models", None, "a.gguf"), "float16"))
    assert "from_pretrained('/models', gguf_file='a.gguf', dtype='float16'" in "".join(gguf)
