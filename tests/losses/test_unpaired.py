"""KTO, APO-zero and BCO of single responses: by hand, by finite differences, and against values that TRL gave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_kto

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.losses.batch import PairSums, PreferenceBatch, next_state, pair_sums, preference_loss
from dpoeng.engine.losses.metrics import preference_metrics
from dpoeng.engine.losses.names import LossSettings

LN2 = math.log(2)
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_kto.json").read_text(encoding="utf-8"))


def sums(ratio: list[float], desirable: list[float], mismatched: list[float] | None = None) -> PairSums:
    """Rows of which only the ratios and labels are given, as leaves; two tokens a response."""
    rows = torch.tensor([ratio, mismatched or [0.0] * len(ratio)], dtype=torch.float64)
    one = torch.ones(len(ratio), dtype=torch.float64)
    labels = torch.tensor(desirable, dtype=torch.float64)
    return PairSums(*rows, *rows, 0 * one, 0 * one, 2 * one, 2 * one, 0 * one, 0 * one, one, labels).leaves()


def settings(name: str, **more: Any) -> LossSettings:
    return LossSettings(loss_type=(name,), **{"beta": 1.0, **more})


def losses(rows: PairSums, chosen: LossSettings, **more: Any) -> list[float]:
    found: list[float] = preference_loss(rows, chosen, **more).losses.tolist()
    return found


def test_kto_by_hand() -> None:
    """The reference point is ln 2 - 0 over two rows: (2 ln 2 + 0) / 2. Ratios ln 4 and ln 6 lie ln 2, ln 3 above it."""
    rows = sums([math.log(4), math.log(6)], [1, 0], [2 * LN2, 0.0])
    assert losses(rows, settings("kto")) == pytest.approx([1 / 3, 3 / 4])
    weighted = settings("kto", desirable_weight=1.5, undesirable_weight=0.2)
    assert losses(rows, weighted) == pytest.approx([0.5, 0.15])


def test_the_reference_point_is_clamped_and_carries_no_gradient() -> None:
    rows = sums([LN2, LN2], [1, 0], [-3.0, 1.0])
    assert losses(rows, settings("kto")) == pytest.approx([1 / 3, 2 / 3])  # mean -1: as if it were 0
    preference_loss(rows, settings("kto")).losses.sum().backward()
    assert rows.rejected_ratio.grad is None
    assert rows.chosen_ratio.grad is not None


def test_apo_zero_unpaired_by_hand() -> None:
    rows = sums([LN2, LN2], [1, 0], [9.0, 9.0])  # mismatched responses do not matter
    assert losses(rows, settings("apo_zero_unpaired")) == pytest.approx([1 / 3, 2 / 3])


def test_bco_by_hand() -> None:
    """The shift is the mean of all rewards so far: earlier ones (three of mean 0.5) and these (1 and 3)."""
    rows = sums([1.0, 3.0], [1, 0])
    shift = (3 * 0.5 + 1 + 3) / 5
    expected = [math.log1p(math.exp(shift - 1)), math.log1p(math.exp(3 - shift))]
    state = {"bco_rewards": 3.0, "bco_mean": 0.5}
    assert losses(rows, settings("bco"), state=state) == pytest.approx(expected)
    assert next_state(state, rows, settings("bco")) == pytest.approx({"bco_rewards": 5.0, "bco_mean": shift})


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
def test_gradients_by_finite_differences(name: str) -> None:
    chosen, labels, others = settings(name, beta=0.7, desirable_weight=1.3), [1.0, 0.0, 1.0], [0.4, -0.1, 2.0]
    ratios = [0.3, -1.2, 2.0]
    rows = sums(ratios, labels, others)
    preference_loss(rows, chosen).losses.sum().backward()
    assert rows.chosen_ratio.grad is not None
    # BCO's shift, a mean of rewards, is a constant to the gradient: it is held where the rows had it.
    held = {"bco_rewards": 1e30, "bco_mean": 0.7 * sum(ratios) / 3} if name == "bco" else None
    for i in range(3):
        ends = []
        for step in (1e-6, -1e-6):
            moved = [ratio + step * (place == i) for place, ratio in enumerate(ratios)]
            ends.append(sum(losses(sums(moved, labels, others), chosen, state=held)))
        assert rows.chosen_ratio.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
def test_extremes_are_finite(name: str) -> None:
    for ratio in (1e4, -1e4):
        rows = sums([ratio, ratio], [1, 0], [ratio, ratio])
        found = preference_loss(rows, settings(name)).losses
        found.sum().backward()
        assert torch.isfinite(found).all()
        assert rows.chosen_ratio.grad is not None
        assert torch.isfinite(rows.chosen_ratio.grad).all()


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """What TRL was asked for, by the path of training: per-token log-probs of both branches to the loss."""
    drawn = trl_kto.draw(case)
    policy = drawn.own.policy.clone().requires_grad_()
    values: dict[str, list[torch.Tensor]] = {"policy": [], "reference": [], "branch": []}
    for row in range(trl_kto.ROWS):
        for at, (side, logps) in enumerate(((drawn.own, policy), (drawn.kl, drawn.kl.policy))):
            mask = side.mask[row]
            values["policy"].append(logps[row][mask])
            values["reference"].append(side.reference[row][mask])
            values["branch"].append(torch.full((int(mask.sum()),), 2 * row + at))
    batch = PreferenceBatch(
        **{name: torch.cat(parts) for name, parts in values.items()},
        pairs=trl_kto.ROWS,
        desirable=drawn.label.double(),
    )
    weights = {name: case[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    chosen = LossSettings(loss_type=(case["loss_type"],), **weights)
    part = preference_loss(pair_sums(batch, chosen), chosen)
    metrics = preference_metrics([part])
    (gradient,) = torch.autograd.grad(part.losses.mean(), policy)
    return {
        "loss": metrics["loss"],
        "kl": metrics["rewards/threshold"] / case["beta"],
        "gradient": gradient[drawn.own.mask].tolist(),
        "rewards/chosen": metrics["rewards/chosen"],
        "rewards/rejected": metrics["rewards/rejected"],
    }


@pytest.mark.parametrize("number", range(len(trl_kto.CASES)))
def test_values_and_gradients_are_trls(number: int) -> None:
    """`tests/support/trl_kto.py` recorded them from TRL 1.16; a step of one forward is TRL's definition."""
    recorded = GOLDEN["cases"][number]
    assert {name: recorded[name] for name in trl_kto.CASES[number]} == trl_kto.CASES[number]
    agree(ours(recorded), recorded["found"])


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


@pytest.mark.peers
@pytest.mark.parametrize("case", trl_kto.CASES, ids=lambda case: f"{case['loss_type']}-{case['seed']}")
def test_trl_itself_gives_what_was_recorded(case: dict[str, Any]) -> None:
    recorded = GOLDEN["cases"][trl_kto.CASES.index(case)]["found"]
    agree(trl_kto.trl_kto(case), recorded)
    agree(ours(case), recorded)


def test_metrics_are_by_label_and_leave_out_what_no_row_has() -> None:
    rows = sums([1.0, 3.0, -1.0], [1, 0, 1], [0.5, 0.5, 0.5])
    found = preference_metrics([preference_loss(rows, settings("kto"))])
    # above the threshold 0.5: rows 0 and 1; desirable: 0 and 2
    shown = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/threshold")
    assert [found[name] for name in shown] == pytest.approx([0.0, 3.0, -3.0, 1 / 3, 0.5])
    alone = preference_metrics([preference_loss(sums([1.0], [1]), settings("kto"))])
    assert not {"rewards/rejected", "rewards/margins"} & alone.keys()
    assert alone["rewards/chosen"] == 1.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"loss_type": ("kto", "sigmoid")}, "mixes losses of several responses with kto"),
        ({"loss_type": ("kto",), "ld_alpha": 0.5}, "ld_alpha cannot be used"),
        ({"loss_type": ("sigmoid",), "desirable_weight": 2.0}, "desirable_weight has no effect"),
        ({"loss_type": ("bco",), "label_smoothing": 0.1}, "label_smoothing has no effect"),
    ],
)
def test_what_has_no_meaning_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig.model_validate(more)
