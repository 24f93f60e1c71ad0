"""Metrics of a loss over pairs, under the field's standard names: one value per pair, or the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dpoeng.engine.losses.batch import PreferenceLoss


def pair_values(part: PreferenceLoss) -> dict[str, torch.Tensor]:
    """Name -> one value per pair, [B], under TRL's names; `kl/` is per token, see `kl_per_token`."""
    values = _all_values(part)
    if part.threshold is not None:
        return values
    if part.sums.chosen_kl.isnan().any():  # the cache has only sums over whole responses
        del values["kl/chosen"], values["kl/rejected"]
    return values


def _all_values(part: PreferenceLoss) -> dict[str, torch.Tensor]:
    auxiliary = {} if part.auxiliary is None else {"aux_loss": part.auxiliary}
    if part.threshold is not None:
        return _unpaired_values(part, part.threshold) | auxiliary
    rows = part.sums.ranked
    if rows is not None:
        assert part.accuracies is not None
        assert part.top is not None
        kl = (rows.means(part.sums.chosen_kl), rows.means(part.sums.rejected_kl))
        return auxiliary | _margin_values(part, part.accuracies, *kl) | {"rewards/top_accuracies": part.top}
    right = (part.chosen_rewards > part.rejected_rewards).double()
    return auxiliary | _margin_values(part, right, part.sums.chosen_kl, part.sums.rejected_kl)


def _margin_values(
    part: PreferenceLoss, accuracies: torch.Tensor, chosen_kl: torch.Tensor, rejected_kl: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        "loss": part.losses.detach(),
        "rewards/chosen": part.chosen_rewards,
        "rewards/rejected": part.rejected_rewards,
        "rewards/margins": part.chosen_rewards - part.rejected_rewards,
        "rewards/accuracies": accuracies,
        "logps/chosen": part.chosen_logps,
        "logps/rejected": part.rejected_logps,
        "kl/chosen": chosen_kl,
        "kl/rejected": rejected_kl,
    }


def _unpaired_values(part: PreferenceLoss, threshold: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same for unpaired rows: `chosen` are the desirable responses, `rejected` the others; NaN elsewhere."""
    assert part.sums.desirable is not None
    desirable = part.sums.desirable > 0
    values = {"loss": part.losses.detach()}
    for name, values_of_all in (
        ("rewards", part.chosen_rewards),
        ("logps", part.chosen_logps),
        ("kl", part.sums.chosen_kl),
    ):
        values[f"{name}/chosen"] = torch.where(desirable, values_of_all, torch.nan)
        values[f"{name}/rejected"] = torch.where(desirable, torch.nan, values_of_all)
    values["rewards/accuracies"] = ((part.chosen_rewards > threshold) == desirable).double()
    return {**values, "rewards/threshold": threshold}


def with_margin(means: Mapping[str, float]) -> dict[str, float]:
    """Means of unpaired rows, without those that no row has, plus the difference between the labels' mean rewards."""
    finite = {name: value for name, value in means.items() if not math.isnan(value)}
    if "rewards/chosen" in finite and "rewards/rejected" in finite:
        finite["rewards/margins"] = finite["rewards/chosen"] - finite["rewards/rejected"]
    return finite


def preference_metrics(parts: Sequence[PreferenceLoss]) -> dict[str, float]:
    """Means over the pairs of several forwards, in a single transfer: each read waits for all of the device's work."""
    values = [_all_values(part) for part in parts]
    unpaired = parts[0].threshold is not None
    mean = torch.nanmean if unpaired else torch.mean
    means = torch.stack([mean(torch.cat([value[name] for value in values])) for name in values[0]])
    averages = dict(zip(values[0], means.cpu().tolist(), strict=True))
    if unpaired:
        # Keep a NaN loss: callers look for it by name.
        return {**with_margin(averages), "loss": averages["loss"]}
    if math.isnan(averages["kl/chosen"]):  # the cache has only sums over whole responses
        del averages["kl/chosen"], averages["kl/rejected"]
    return averages
