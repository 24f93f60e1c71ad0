"""Every loss that TRL 1.16 has against TRL's own code: values and gradients by every token's log-prob.

TRL's losses are part of its trainers' methods. They are called on a stub that holds the settings, with a "model" that
returns given log-probs. `make test-peers` runs this file.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpoeng.engine.losses.batch import LOSSES, PreferenceBatch, pair_sums, preference_loss
from dpoeng.engine.losses.names import LossSettings

pytestmark = pytest.mark.peers

OURS = {"dpop", "beta_dpo", "simpo", "cpo", "orpo", "kto", "apo_zero_unpaired", "bco", "soft_sigmoid"}
TRL_DPO = sorted(set(LOSSES) - OURS)


class Tokens:
    """Log-probs of B pairs of ragged length, for both programs; the leaves are TRL's padded ones."""

    def __init__(self, seed: int, pairs: int, shift: tuple[float, float] = (0.0, 0.0), dtype: Any = torch.float64):
        draw = torch.Generator().manual_seed(seed)
        self.pairs = pairs
        self.lengths = torch.randint(1, 7, (2 * pairs,), generator=draw)  # TRL's order: all chosen, then all rejected
        width = int(self.lengths.max())
        self.mask = torch.arange(width) < self.lengths[:, None]
        self.reference = -torch.rand(2 * pairs, width, generator=draw, dtype=torch.float64).to(dtype) * 3
        moved = self.reference + torch.randn(2 * pairs, width, generator=draw, dtype=torch.float64).to(dtype)
        moved[:pairs, 0] += shift[0]
        moved[pairs:, 0] += shift[1]
        self.policy = moved.requires_grad_()
        self.collision = -torch.rand(2 * pairs, width, generator=draw, dtype=torch.float64).to(dtype)

    def ours(self) -> PreferenceBatch:
        order = [side * self.pairs + i for i in range(self.pairs) for side in (0, 1)]
        pick = [(row, t) for row in order for t in range(int(self.lengths[row]))]
        rows, columns = (torch.tensor(part) for part in zip(*pick, strict=True))
        branch = torch.tensor([at for at, row in enumerate(order) for _ in range(int(self.lengths[row]))])
        return PreferenceBatch(
            self.policy[rows, columns],
            self.reference[rows, columns],
            branch,
            self.pairs,
            log_collision=self.collision[rows, columns],
        )


def trl_loss(tokens: Tokens, chosen: LossSettings) -> torch.Tensor:
    from trl import DPOTrainer

    class Model(torch.nn.Module):
        """Gives the log-probs that it was made with."""

        is_gradient_checkpointing = False

        def __init__(self, logps: torch.Tensor) -> None:
            super().__init__()
            self.logps = [logps]

        def forward(self, **_: Any) -> Any:
            zeros = torch.zeros_like(self.logps[0])
            return SimpleNamespace(
                log_probs=self.logps[0] * tokens.mask,
                log_sum_sq_probs=tokens.collision,
                entropy=zeros,
                mean_logits=zeros,
                is_top1=zeros.bool(),
            )

    completion = torch.cat([torch.zeros(2 * tokens.pairs, 1, dtype=torch.long), tokens.mask.long()], 1)
    stub = SimpleNamespace(
        model=Model(tokens.policy),
        ref_model=Model(tokens.reference),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=list(chosen.loss_type),
        loss_weights=list(chosen.loss_weights or [1.0] * len(chosen.loss_type)),
        args=SimpleNamespace(discopop_tau=chosen.discopop_tau, gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{
            name: getattr(chosen, name)
            for name in ("beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing")
        },
        use_weighting=chosen.use_weighting,
    )
    inputs = {"input_ids": completion, "attention_mask": torch.ones_like(completion), "completion_mask": completion}
    found: torch.Tensor = DPOTrainer._compute_loss(stub, stub.model, inputs, return_outputs=False)
    return found


def both(tokens: Tokens, chosen: LossSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """TRL's loss and gradient, ours."""
    theirs = trl_loss(tokens, chosen)
    (their_gradient,) = torch.autograd.grad(theirs, tokens.policy)
    ours = preference_loss(pair_sums(tokens.ours(), chosen), chosen).losses.mean()
    (our_gradient,) = torch.autograd.grad(ours, tokens.policy)
    return theirs.detach(), their_gradient, ours.detach(), our_gradient


def agree(tokens: Tokens, chosen: LossSettings, relative: float = 1e-6) -> None:
    theirs, their_gradient, ours, our_gradient = both(tokens, chosen)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=relative, atol=1e-12)
    scale = float(their_gradient.abs().max())
    torch.testing.assert_close(our_gradient, their_gradient, rtol=relative, atol=relative * scale + 1e-300)


def base(*names: str) -> LossSettings:
    smoothed = {"exo_pair": 1e-3, "robust": 0.1}
    return LossSettings(loss_type=names, label_smoothing=max([smoothed.get(name, 0.0) for name in names]))


# TRL refuses WPO for aot; for hinge and sft its weighting in place ends in a RuntimeError of torch.
UNWEIGHTED = {"aot", "aot_unpaired", "hinge", "sft"}
VARIANTS: list[LossSettings] = [
    *(base(name) for name in TRL_DPO),
    *(replace(base(name), beta=2.5) for name in TRL_DPO),
    *(replace(base(name), ld_alpha=0.3) for name in TRL_DPO if name != "sft"),
    *(replace(base(name), use_weighting=True) for name in TRL_DPO if name not in UNWEIGHTED),
    *(replace(base(name), label_smoothing=0.2) for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
    *(
        replace(base(name), f_divergence_type=kind)
        for kind in ("forward_kl", "js_divergence")
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
    ),
    replace(base("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    replace(base("sigmoid", "bco_pair"), use_weighting=True, ld_alpha=0.5),
]


def label(chosen: LossSettings) -> str:
    """What differs from the defaults."""
    plain = LossSettings()
    changed = [name for name in LossSettings.__dataclass_fields__ if getattr(chosen, name) != getattr(plain, name)]
    return ",".join(f"{name}={getattr(chosen, name)}" for name in changed) or "sigmoid"


@pytest.mark.parametrize("chosen", VARIANTS, ids=label)
def test_values_and_gradients(chosen: LossSettings) -> None:
    for seed, scale in ((0, 1.0), (1, 5.0), (2, 30.0)):
        draw = torch.Generator().manual_seed(seed)
        agree(Tokens(seed, 6, tuple((scale * torch.randn(2, generator=draw)).tolist())), chosen)


@pytest.mark.parametrize("coefficient", [0.5, 1.0, 2.0])
def test_the_alpha_divergence_in_trls_float32(coefficient: float) -> None:
    """TRL takes it in float32 at most, so its own rounding shows: 1e-5."""
    for name in ("sigmoid", "ipo", "hinge"):
        chosen = replace(base(name), f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient)
        agree(Tokens(4, 6, dtype=torch.float32), chosen, 1e-5)


EDGES = [0.0, 50.0, -50.0, 1e4, -1e4]


@pytest.mark.parametrize("name", TRL_DPO)
def test_extremes(name: str) -> None:
    """Log-ratios of up to 1e4 on either side, pair by pair. Ours is finite everywhere; TRL's DiscoPOP is not."""
    compared = 0
    for shift in ((a, b) for a in EDGES for b in EDGES):
        tokens = Tokens(7, 1, shift)
        theirs, their_gradient, ours, our_gradient = both(tokens, base(name))
        assert torch.isfinite(ours)
        assert torch.isfinite(our_gradient).all()
        if torch.isfinite(theirs) and torch.isfinite(their_gradient).all():
            compared += 1
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-12)
    print(f"{name}: equal at {compared} of {len(EDGES) ** 2} extremes; TRL is not finite at the others")
    assert compared == len(EDGES) ** 2 or (name == "discopop" and compared >= 15)


def test_label_smoothing_of_sigmoid_does_something_here() -> None:
    """TRL 0.29 and later read `label_smoothing` and leave it out of the sigmoid loss. cDPO by its formula instead."""
    tokens, smoothed = Tokens(0, 4), replace(base("sigmoid"), label_smoothing=0.2)
    plain, _, ours, _ = both(tokens, smoothed)
    assert plain.item() == pytest.approx(trl_loss(tokens, base("sigmoid")).item())
    sums = pair_sums(tokens.ours(), smoothed)
    delta = 0.1 * (sums.chosen_ratio - sums.rejected_ratio).detach()
    expected = 0.8 * torch.log1p(torch.exp(-delta)) + 0.2 * torch.log1p(torch.exp(delta))
    assert ours.item() == pytest.approx(expected.mean().item())
    assert abs(ours.item() - plain.item()) > 1e-3


@pytest.mark.parametrize(
    "chosen",
    [
        LossSettings(loss_type=("simpo",), beta=2.0),
        LossSettings(loss_type=("simpo",), beta=2.5, simpo_gamma=1.4, label_smoothing=0.1),
        LossSettings(loss_type=("cpo",), beta=0.1, cpo_alpha=0.0),
        LossSettings(loss_type=("cpo",), beta=0.5, cpo_alpha=0.7, label_smoothing=0.1),
    ],
    ids=label,
)
def test_cpo_and_simpo(monkeypatch: pytest.MonkeyPatch, chosen: LossSettings) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    tokens = Tokens(3, 6)
    sums = pair_sums(tokens.ours(), chosen)
    simpo = chosen.loss_type == ("simpo",)
    divisors = (sums.chosen_tokens, sums.rejected_tokens) if simpo else (1.0, 1.0)
    stub = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo" if simpo else "sigmoid",
        beta=chosen.beta,
        simpo_gamma=chosen.simpo_gamma,
        label_smoothing=chosen.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(
        stub, sums.chosen_logps / divisors[0], sums.rejected_logps / divisors[1]
    )
    theirs = losses.mean()
    if not simpo:  # its trainer adds the cross-entropy per chosen token
        theirs = theirs - chosen.cpo_alpha * sums.chosen_logps.sum() / sums.chosen_tokens.sum()
    found = preference_loss(sums, chosen)
    torch.testing.assert_close(found.losses.mean(), theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.chosen_rewards, chosen_rewards)
    torch.testing.assert_close(found.rejected_rewards, rejected_rewards)
    gradients = [torch.autograd.grad(x, tokens.policy, retain_graph=True)[0] for x in (found.losses.mean(), theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_orpo(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes the odds in float32, so its rounding shows; and its likelihood term, over prompt too, is not ours."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    chosen = LossSettings(loss_type=("orpo",), beta=0.3)
    draw = torch.Generator().manual_seed(0)
    tokens = Tokens(3, 6)
    with torch.no_grad():
        tokens.policy.copy_(-0.05 - 2 * torch.rand(tokens.policy.shape, generator=draw, dtype=torch.float64))
    sums = pair_sums(tokens.ours(), chosen)
    stub = SimpleNamespace(beta=chosen.beta, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(
        stub, sums.chosen_logps / sums.chosen_tokens, sums.rejected_logps / sums.rejected_tokens
    )[0]
    odds = preference_loss(sums, chosen).losses - preference_loss(sums, LossSettings(loss_type=("sft",))).losses
    torch.testing.assert_close(odds, theirs.double(), rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(x.sum(), tokens.policy, retain_graph=True)[0] for x in (odds, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_the_names_are_trls() -> None:
    import trl.trainer.dpo_trainer as source

    text = Path(source.__file__).read_text(encoding="utf-8")
    assert set(TRL_DPO) == {name for name in LOSSES if f'loss_type == "{name}"' in text}
