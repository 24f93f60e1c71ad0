"""A stand-in for TRL's DPOTrainer: what `with_cached_reference` asks of it, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self

import torch

from dpoeng.cache.reader import View


class Data:
    """What `datasets.Dataset` offers."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["prompt_ids"])

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {name: values[i] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select_columns(self, names: list[str]) -> Self:
        return type(self)({name: self.columns[name] for name in names})

    def add_column(self, name: str, values: list[float]) -> Self:
        return type(self)({**self.columns, name: values})


def collator(length: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Truncates from the right to `length`, as TRL's does."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        (row,) = rows
        texts = [(row["prompt_ids"] + row[name])[:length] for name in ("chosen_ids", "rejected_ids")]
        width = max(map(len, texts))
        prompt = len(row["prompt_ids"])
        padded = [(text + [0] * (width - len(text)), [1] * len(text) + [0] * (width - len(text))) for text in texts]
        held = torch.tensor([mask for _, mask in padded])
        return {
            "input_ids": torch.tensor([text for text, _ in padded]),
            "attention_mask": held,
            "completion_mask": held * (torch.arange(width) >= prompt),
        }

    return collate


def stand_in(view: View, *, wrong: float = 0.0, length: int = 999, **args: Any) -> Any:
    columns = {
        name: [getattr(view[i].ids, name).tolist() for i in range(len(view))]
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    live = {tuple(view[i].ids.chosen_ids): (view[i].chosen_sum, view[i].rejected_sum) for i in range(len(view))}

    def compute_ref_log_probs(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
        chosen = tuple(inputs["input_ids"][0][inputs["completion_mask"][0] == 1].tolist())
        return [live[chosen][0] + wrong], [live[chosen][1] - wrong]

    return SimpleNamespace(
        precompute_ref_logps=False,
        train_dataset=Data(columns),
        eval_dataset={"some": Data({name: values[:3] for name, values in columns.items()})},
        data_collator=collator(length),
        args=SimpleNamespace(**args),
        ref_model=object(),
        model=SimpleNamespace(dtype=torch.float32),
        accelerator=SimpleNamespace(device="cpu"),
        compute_ref_log_probs=compute_ref_log_probs,
    )
