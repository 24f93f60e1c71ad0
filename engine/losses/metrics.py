"""Metrics of a loss over pairs, by the field's names: a number a pair, or the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dpoeng.engine.losses.batch import PreferenceLoss


def pair_values(part: PreferenceLoss) -> dict[str, torch.Tensor]:
    """Name -> a number a pair, [B], under the names that TRL gave them; `kl/` is per token, see `kl_per_token`."""
    values = _all_values(part)
    if part.sums.chosen_kl.isnan().any():  # the cache holds sums over whole responses
        del values["kl/chosen"], values["kl/rejected"]
    return values


def _all_values(part: PreferenceLoss) -> dict[str, torch.Tensor]:
    return {
        "loss": part.losses.detach(),
        "rewards/chosen": part.chosen_rewards,
        "rewards/rejected": part.rejected_rewards,
        "rewards/margins": part.chosen_rewards - part.rejected_rewards,
        "rewards/accuracies": (part.chosen_rewards > part.rejected_rewards).double(),
        "logps/chosen": part.chosen_logps,
        "logps/rejected": part.rejected_logps,
        "kl/chosen": part.sums.chosen_kl,
        "kl/rejected": part.sums.rejected_kl,
    }


def preference_metrics(parts: Sequence[PreferenceLoss]) -> dict[str, float]:
    """Means over the pairs of several forwards, read from the device at once: each read waits for all it has to do."""
    values = [_all_values(part) for part in parts]
    means = torch.stack([torch.cat([value[name] for value in values]).mean() for name in values[0]])
    found = dict(zip(values[0], means.cpu().tolist(), strict=True))
    if math.isnan(found["kl/chosen"]):  # the cache holds sums over whole responses
        del found["kl/chosen"], found["kl/rejected"]
    return found
