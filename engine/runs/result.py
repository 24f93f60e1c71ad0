"""Writes a run's result with tokenizer and model card, atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dpoeng.engine.config.fields import Mode
from dpoeng.engine.models.adapters import save_policy_adapter
from dpoeng.engine.models.full_finetuning import save_model
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.models.tokenizer import TokenizerChoice, copy_tokenizer
from dpoeng.engine.runs.card import CARD_FILE
from dpoeng.engine.runs.folder import result_folder
from dpoeng.engine.runtime.folders import place_folder, saving_tensors, sync_file


def write_result(
    lm: CausalLM,
    output_dir: Path,
    mode: Mode,
    source: ModelSource,
    weights: Mapping[str, torch.Tensor] | None = None,
    tokenizer: TokenizerChoice | None = None,
    card: str = "",
) -> None:
    """Saves the adapter, or the whole checkpoint with other files as in `source`, atomically.

    `weights` are the result of `full_finetuning.whole_weights`. A `tokenizer` that is not the base's is added, and the
    text `model_card` as README.md.
    """

    def fill(temporary: Path) -> None:
        with saving_tensors():
            if mode == "full":
                save_model(lm, source, temporary, weights)
            else:
                save_policy_adapter(lm, temporary)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, temporary)
            if card:
                (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        for path in temporary.iterdir():
            sync_file(path)

    place_folder(result_folder(output_dir, mode), fill)
