"""Configuration: one set of fields, one precedence, and errors that name the field and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import load_config


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "dpoeng.yaml"
    file.write_text("model: base\nbeta: 0.3\nseed: 7\nmax_length: 99\n")
    trained = load_config(TrainConfig, {"beta": 0.5}, file)
    assert (trained.beta, trained.seed, trained.learning_rate) == (0.5, 7, 1e-5)
    scored = load_config(PrecomputeConfig, {}, file)  # the same file serves both phases
    assert (scored.model, scored.max_length) == ("base", 99)


def test_the_file_in_the_current_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(PrecomputeConfig, {}).model is None
    (tmp_path / "dpoeng.yaml").write_text("model: here\n")
    assert load_config(PrecomputeConfig, {}).model == "here"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("learning_rte: 1e-5", "config-unknown", ["learning_rte", "learning_rate (train)"]),
        ("max_lenght: 5", "config-unknown", ["max_length (precompute-ref)"]),
        ("beta: -1", "config-value", ["beta", "greater than 0", "-1"]),
        ("beta: high", "config-value", ["beta", "'high'"]),
        ("loss_type: sgimoid", "config-value", ["loss_type", "'sigmoid'"]),
        ("loss_type: tdpo", "config-value", ["loss_type", "over the vocabulary"]),
        ("loss_type: [sigmoid, kto]", "config-value", ["one response and a label"]),
        ("loss_type: aot_pair", "config-value", ["use aot"]),
        ("loss_type: []", "config-value", ["loss_type"]),
        ("loss_type: [sigmoid, sigmoid]", "config-value", ["twice"]),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1.0]", "config-value", ["loss_weights", "give one each"]),
        ("label_smoothing: 0.1\nloss_type: ipo", "config-value", ["label_smoothing has no effect", "robust"]),
        ("label_smoothing: 0.5", "config-value", ["label_smoothing", "less than 0.5"]),
        ("loss_type: exo_pair", "config-value", ["label_smoothing above 0", "1e-3"]),
        ("discopop_tau: 0.1", "config-value", ["discopop_tau has no effect with loss_type sigmoid"]),
        ("loss_type: bco_pair\nf_divergence_type: forward_kl", "config-value", ["normaliser", "bco_pair"]),
        ("loss_type: sft\nf_divergence_type: forward_kl", "config-value", ["has no effect"]),
        ("f_alpha_divergence_coef: 0.3", "config-value", ["has no effect with f_divergence_type reverse_kl"]),
        ("loss_type: [sigmoid, sft]\nrpo_alpha: 1", "config-value", ["same kind of term"]),
        ("loss_type: simpo\nld_alpha: 0.5", "config-value", ["divides by the length already"]),
        ("loss_type: sft\nld_alpha: 0.5", "config-value", ["has no effect"]),
        ("loss_type: [sft, cpo]\nld_alpha: 0.5", "config-value", ["has no effect"]),
        ("loss_type: aot\nuse_weighting: true", "config-value", ["sorts the pairs"]),
        ("loss_type: aot_unpaired\npair_weight_column: margin", "config-value", ["sorts the pairs"]),
        ("early_stopping_patience: 2\neval_share: 0", "config-value", ["held-out pairs"]),
        ("greater_is_better: true", "config-value", ["has no effect without"]),
        ("early_stopping_threshold: 0.1", "config-value", ["early_stopping_patience"]),
        ("- a\n- b", "config-unreadable", ["not a set of fields"]),
        ("beta: [", "config-unreadable", ["YAML"]),
        ("a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]", "config-unreadable", ["mine.yaml:2", "alias"]),
        ("# " + "x" * (1 << 20), "config-unreadable", ["1 MiB"]),
        ("adapter_mode: continue\nlora_r: 8", "config-value", ["lora_r", "adapter_mode stack"]),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, code: str, words: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, {}, file)
    assert caught.value.code == code
    assert caught.value.remedy
    assert caught.value.exit_status == 2
    for word in words:
        assert word in str(caught.value)


def test_losses_are_given_by_name_list_or_with_commas(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\n")
    mixed = load_config(TrainConfig, {}, file)
    assert (mixed.loss_type, mixed.loss_weights) == (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0))
    given = load_config(TrainConfig, {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": ("0.8", "0.2", "1")})
    assert (given.loss_type, given.loss_weights) == (mixed.loss_type, mixed.loss_weights)
    assert load_config(TrainConfig, {"loss_type": "ipo"}).loss_type == ("ipo",)
    assert load_config(TrainConfig, {"loss_type": "sigmoid, sft"}).loss_type == ("sigmoid", "sft")
    # What a run recorded of itself names every field, most of them at their default, and is accepted again.
    assert TrainConfig(**mixed.model_dump(mode="json")) == mixed


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_config(TrainConfig, {}, tmp_path / "none.yaml")


def test_a_wrong_option_is_named_as_an_option() -> None:
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, {"lora_dropout": 1.5})
    assert caught.value.where == "--lora-dropout"


def test_every_field_is_described_and_frozen() -> None:
    for cls in (PrecomputeConfig, TrainConfig):
        for name, field in cls.model_fields.items():
            assert field.description, name
            assert re.search(r"(\.|arxiv\.org/abs/[\d.]+)$", field.description), name
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().beta = 0.2  # type: ignore[misc]


def test_a_new_line_written_in_a_shell() -> None:
    config = load_config(PrecomputeConfig, {"prompt_format": r"Instruction: {prompt}\nResponse:"})
    assert config.prompt_format == "Instruction: {prompt}\nResponse:"


def test_a_pipe_is_not_a_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="regular file"):
        load_config(TrainConfig, {}, tmp_path / "pipe.yaml")
