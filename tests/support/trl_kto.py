"""TRL's KTO on given log-probs: what tests/losses/golden_kto.json was recorded from, and what `make test-peers` runs.

`.venv-peers/bin/python tests/support/trl_kto.py tests/losses/golden_kto.json` records the file anew. TRL's loss is part
of its trainer's methods. It is called on a stub that holds the settings, with a "model" that returns given log-probs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CASES: list[dict[str, Any]] = [
    {"loss_type": kind, "beta": beta, "desirable_weight": good, "undesirable_weight": bad, "seed": seed, "scale": scale}
    for kind in ("kto", "apo_zero_unpaired")
    for seed, (beta, good, bad, scale) in enumerate(
        [(0.1, 1.0, 1.0, 1.0), (0.5, 1.33, 1.0, 2.0), (2.0, 1.0, 0.25, 10.0), (0.1, 1.0, 1.0, -3.0)]
    )
]
"""`scale` moves the policy's log-probs: below 0 the mismatched responses lose likelihood, and the KL is held at 0."""

ROWS = 6


def draw(case: dict[str, Any]) -> SimpleNamespace:
    """Ragged log-probs of ROWS responses and of their mismatched ones, [ROWS, T] float64 each; labels [ROWS]."""
    made = torch.Generator().manual_seed(case["seed"])
    found = SimpleNamespace(label=torch.tensor([True, False, True, True, False, False]))
    for name in ("own", "kl"):
        lengths = torch.randint(1, 7, (ROWS,), generator=made)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        reference = -3 * torch.rand(mask.shape, generator=made, dtype=torch.float64) * mask
        shift = torch.rand(mask.shape, generator=made, dtype=torch.float64) - (0.5 if name == "own" else 0.2)
        policy = (reference + case["scale"] * shift) * mask
        setattr(found, name, SimpleNamespace(policy=policy, reference=reference, mask=mask))
    return found


def trl_kto(case: dict[str, Any]) -> dict[str, Any]:
    """TRL's loss, its gradient by every token's log-prob of the responses, and the KL that it reports."""
    from trl import KTOTrainer

    drawn = draw(case)
    policy = drawn.own.policy.clone().requires_grad_()
    marker = 7  # a token of the mismatched texts, by which the model tells them from the others

    def model(input_ids: torch.Tensor, **_: Any) -> Any:
        of_kl = bool((input_ids == marker).any())
        zeros = torch.zeros_like(drawn.kl.policy if of_kl else policy)
        logps = drawn.kl.policy if of_kl else policy
        return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def texts(mask: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        completion = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), mask.long()], 1)
        return token * torch.ones_like(completion), torch.ones_like(completion), completion

    own, kl = texts(drawn.own.mask, 3), texts(drawn.kl.mask, marker)
    inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), own, strict=True))
    inputs |= dict(zip(("KL_input_ids", "KL_attention_mask", "KL_completion_mask"), kl, strict=True))
    inputs |= {"label": drawn.label, "ref_logps": drawn.own.reference.sum(1), "ref_KL_logps": drawn.kl.reference.sum(1)}
    metrics: Any = {"train": defaultdict(list)}
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        calculate_KL=case["loss_type"] == "kto",
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: KTOTrainer._compute_kl_logps(stub, model, batch),
        **{name: case[name] for name in ("loss_type", "beta", "desirable_weight", "undesirable_weight")},
    )
    loss = KTOTrainer._compute_loss(stub, model, inputs, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, policy)
    return {
        "loss": loss.item(),
        "kl": metrics["train"]["kl"][0],
        "gradient": gradient[drawn.own.mask].tolist(),
        "rewards/chosen": metrics["train"]["rewards/chosen"][0],
        "rewards/rejected": metrics["train"]["rewards/rejected"][0],
    }


if __name__ == "__main__":
    import trl

    record = {"trl": trl.__version__, "cases": [{**case, "found": trl_kto(case)} for case in CASES]}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
