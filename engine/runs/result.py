"""Writes what a run trained, with tokenizer and model card, whole or not at all."""

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
    """Saves what was trained, whole or not at all: the adapter, or a checkpoint with the rest as in `source`.

    `weights` are those of `full.whole_weights`. A `tokenizer` that is not the base's is put beside them, and the text
    of `model_card` as README.md.
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
