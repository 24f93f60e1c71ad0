"""Metrics of a loss over pairs, by the field's names: a number a pair, or the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dpoeng.engine.losses.batch import PreferenceLoss


def pair_values(part: PreferenceLoss) -> dict[str, torch.Tensor]:
    """Name -> a number a pair, [B], under the names that TRL gave them; `kl/` is per token, see `kl_per_token`."""
    values = _all_values(part)
    if part.threshold is not None:
        return values
    if part.sums.chosen_kl.isnan().any():  # the cache holds sums over whole responses
        del values["kl/chosen"], values["kl/rejected"]
    return values


def _all_values(part: PreferenceLoss) -> dict[str, torch.Tensor]:
    if part.threshold is not None:
        return _unpaired_values(part, part.threshold)
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


def _unpaired_values(part: PreferenceLoss, threshold: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of unpaired rows: `chosen` are the desirable responses, `rejected` the others; NaN elsewhere."""
    assert part.sums.desirable is not None
    desirable = part.sums.desirable > 0
    values = {"loss": part.losses.detach()}
    for name, of_all in (("rewards", part.chosen_rewards), ("logps", part.chosen_logps), ("kl", part.sums.chosen_kl)):
        values[f"{name}/chosen"] = torch.where(desirable, of_all, torch.nan)
        values[f"{name}/rejected"] = torch.where(desirable, torch.nan, of_all)
    values["rewards/accuracies"] = ((part.chosen_rewards > threshold) == desirable).double()
    return {**values, "rewards/threshold": threshold}


def with_margin(means: Mapping[str, float]) -> dict[str, float]:
    """Means of unpaired rows without those that no row has, and with the difference of the rewards of both labels."""
    found = {name: value for name, value in means.items() if not math.isnan(value)}
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def preference_metrics(parts: Sequence[PreferenceLoss]) -> dict[str, float]:
    """Means over the pairs of several forwards, read from the device at once: each read waits for all it has to do."""
    values = [_all_values(part) for part in parts]
    unpaired = parts[0].threshold is not None
    mean = torch.nanmean if unpaired else torch.mean
    means = torch.stack([mean(torch.cat([value[name] for value in values])) for name in values[0]])
    found = dict(zip(values[0], means.cpu().tolist(), strict=True))
    if unpaired:
        # A loss that is no number is looked for by its name, and must not go missing here.
        return {**with_margin(found), "loss": found["loss"]}
    if math.isnan(found["kl/chosen"]):  # the cache holds sums over whole responses
        del found["kl/chosen"], found["kl/rejected"]
    return found
