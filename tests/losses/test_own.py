"""Losses of the user's own: the docs' example in training, what is refused before it, when a run is resumed."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, tree, write_jsonl
from torch.nn.functional import logsigmoid

import dpoeng
from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.own import LossInputs, OwnLoss, as_own_loss, code_digest
from dpoeng.engine.losses.own_check import check_own_losses
from dpoeng.engine.losses.sums import PreferenceBatch, loss_inputs
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train

DOCS = Path(__file__).resolve().parents[2] / "docs" / "losses.md"
SCALE = 1.0


def dpo(x: LossInputs) -> torch.Tensor:
    """`sigmoid`, once more."""
    ratio = (x.chosen_logps - x.ref_chosen_logps) - (x.rejected_logps - x.ref_rejected_logps)
    return -logsigmoid(x.beta * SCALE * ratio)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("own")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def settings(cache: Path, out: Path, **fields: Any) -> dict[str, Any]:
    return {
        "cache": cache,
        "output_dir": out,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "lora_r": 4,
        "save_steps": 1,
    } | fields


def test_the_arguments_of_a_loss() -> None:
    """Two pairs by hand: the first of 2 and 1 tokens, the second of 1 and 2."""
    policy = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    batch = PreferenceBatch(policy, policy - 0.5, torch.tensor([0, 0, 1, 2, 3, 3]), 2)
    x = loss_inputs(batch, 0.1)
    assert (x.chosen_logps.tolist(), x.rejected_logps.tolist()) == ([-3.0, -4.0], [-3.0, -11.0])
    assert (x.ref_chosen_logps.tolist(), x.ref_rejected_logps.tolist()) == ([-4.0, -4.5], [-3.5, -12.0])
    assert x.chosen_token_logps.tolist() == [[-1.0, -2.0], [-4.0, 0.0]]
    assert x.ref_rejected_token_logps.tolist() == [[-3.5, 0.0], [-5.5, -6.5]]
    assert (x.chosen_mask.tolist(), x.rejected_tokens.tolist()) == ([[True, True], [True, False]], [1.0, 2.0])


def test_the_example_of_the_docs_trains(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"## A loss of your own.*?```python\n(.*?)```.*?```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(code[1])
    Path("refcache").symlink_to(cache)
    more = ["--max-steps", "2", "--save-steps", "1", "--lora-r", "4"]
    with pytest.raises(SystemExit) as stop:
        main([*code[2].split()[1:], *more])
    assert stop.value.code == 0
    # The comments of a loss may change, and what it computes may not.
    Path("my_loss.py").write_text(code[1].replace("# [B, C] -> [B]", "# a sum"))
    with pytest.raises(SystemExit) as stop:
        main([*code[2].split()[1:], *more, "--resume"])
    assert stop.value.code == 0
    Path("my_loss.py").write_text(code[1].replace("tanh", "sinh"))
    loss: Any = "my_loss.py:my_loss"
    changed = settings(Path("refcache"), Path("out"), max_steps=2, loss_type=loss)
    with pytest.raises(UserError, match="own_loss") as caught:
        dpoeng.train(**{**changed, "learning_rate": 5e-6})
    assert caught.value.code == "resume-changed"
    # A run's record alone starts no code of anybody's.
    with pytest.raises(UserError, match="named by you") as caught:
        dpoeng.evaluate("out")
    assert caught.value.code == "loss-own-missing"


@pytest.mark.parametrize("cut", [(4, 1), (1, 4)], ids=["at once", "one by one"])
def test_it_gives_the_bytes_of_the_built_in_loss(cache: Path, tmp_path: Path, cut: tuple[int, int]) -> None:
    fields = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
    train(TrainConfig(**settings(cache, tmp_path / "built-in", **fields)))
    dpoeng.train(**settings(cache, tmp_path / "own", **fields), loss=dpo)
    assert tree(tmp_path / "own" / "adapter").keys() == tree(tmp_path / "built-in" / "adapter").keys()
    name = "adapter/adapter_model.safetensors"
    from safetensors.torch import load_file

    own, built_in = (load_file(tmp_path / folder / name) for folder in ("own", "built-in"))
    for key, value in built_in.items():
        torch.testing.assert_close(own[key], value, atol=1e-7, rtol=1e-4)


def test_beside_a_loss_of_the_whole_batch(cache: Path, tmp_path: Path) -> None:
    """Its gradient passes through the sums, and a mixture of twice the same is that loss."""
    fields: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    mixed = {"loss_type": ("aot_unpaired", as_own_loss(dpo)), "loss_weights": (0.5, 0.5)}
    built_in = {"loss_type": ("aot_unpaired", "sigmoid"), "loss_weights": (0.5, 0.5)}
    from safetensors.torch import load_file

    found = []
    for name, losses in (("own", mixed), ("built-in", built_in)):
        train(TrainConfig(**settings(cache, tmp_path / name, **fields, **losses)))
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, atol=1e-7, rtol=1e-4)


def ratio(x: LossInputs) -> torch.Tensor:
    return (x.chosen_logps - x.ref_chosen_logps) - (x.rejected_logps - x.ref_rejected_logps)


CALLS: list[int] = []


def drawn(x: LossInputs) -> torch.Tensor:
    CALLS.append(1)
    return -ratio(x) * len(CALLS)


WRONG = {
    "a function that runs": lambda x: x.no_such_field,
    "a tensor": lambda x: 1.0,
    "one loss per pair": lambda x: -ratio(x).mean(),
    "finite numbers": lambda x: torch.log(ratio(x)),  # of 0 at the start
    "a loss with a gradient": lambda x: -ratio(x).detach(),
    "with a finite gradient": lambda x: torch.sqrt(ratio(x) ** 2),  # 0 / 0 at the start
    "neighbours": lambda x: -(ratio(x) - ratio(x).mean()) + ratio(x),
    "neighbours ": lambda x: -x.chosen_token_logps.mean(-1),  # the padding counts
    "the slope": lambda x: -ratio(x) * ratio(x).detach().exp(),
    "each call": drawn,
}


@pytest.mark.parametrize("expected", WRONG)
def test_what_cannot_be_trained_with_is_refused(expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check_own_losses([as_own_loss(WRONG[expected])], 0.1)
    assert caught.value.code == "loss-own-unfit"
    assert expected.strip() in caught.value.message


def test_check_tries_a_loss_and_shows_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The docs' example is fine; a mean is not, and what it passed before is shown; exit statuses 0 and 3."""
    code = re.search(r"## A loss of your own.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    typed = re.search(r"```sh\n(dpoeng check --loss-type .*?)\n```", DOCS.read_text())
    assert code is not None
    assert typed is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("my_loss.py").write_text(code[1])
    Path("mine.py").write_text(
        "def detached(x):\n    return -x.chosen_logps * x.chosen_logps.detach()\n\n\n"
        "def mean(x):\n    return -x.chosen_logps.mean()\n"
    )
    with pytest.raises(SystemExit, match="0"):
        main(typed[1].split()[1:])
    said = capsys.readouterr().out
    # -log sigmoid(0), whatever bounds the ratios, and beta / 2 for each token where the policy is the reference
    assert "[0.693147, 0.693147, 0.693147, 0.693147], while" in said
    assert "at most 0.05 a token, while" in said
    for asked in ("found", "one finite loss a pair", "finite gradient", "independent of neighbours"):
        assert asked in said
    assert "of finite differences, at 26 tokens" in said
    assert said.rstrip().endswith("fine")
    with pytest.raises(SystemExit, match="3"):
        main("check --loss-type sigmoid,mine.py:detached,mine.py:mean,mine.py:other --beta 0.2 --json".split())
    built_in, detached, mean, other = json.loads(capsys.readouterr().out)
    assert (built_in["ok"], built_in["seen"]) == (True, [])
    assert [line["asked"] for line in detached["seen"]][-1] == "independent of neighbours"
    assert "the slope of its value" in detached["error"]
    assert [line["asked"] for line in mean["seen"]] == ["found"]
    assert "do not take the mean" in mean["error"]
    assert (other["ok"], other["seen"]) == (False, [])
    for words in ("check pairs.jsonl --loss-type sigmoid", "check --beta 0.2", "check --loss-type sigmoid --strict"):
        with pytest.raises(SystemExit, match="2"):
            main(words.split())


def test_what_can_be_trained_with_is_not() -> None:
    check_own_losses(["sigmoid", as_own_loss(dpo), as_own_loss(lambda x: torch.relu(1 - ratio(x)))], 0.1)

    def weighted(x: LossInputs) -> torch.Tensor:
        return -ratio(x) * ratio(x).detach().exp()

    weighted.holds_parts_constant = True  # type: ignore[attr-defined]
    check_own_losses([as_own_loss(weighted)], 0.1)
    with pytest.raises(UserError, match="sums over responses"):
        check_own_losses([as_own_loss(lambda x: -(x.chosen_token_logps - x.ref_chosen_token_logps).sum(-1))], 0.1,
                         per_token=False)  # fmt: skip


def test_a_loss_is_known_by_all_that_it_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(gamma: float, powers: frozenset[str] = frozenset("abc")) -> Any:
        return lambda x: -ratio(x) * gamma * len(powers)

    before = code_digest(dpo, "dpo")
    assert code_digest(dpo, "dpo") == before
    assert code_digest(made(0.5), "made") == code_digest(made(0.5), "made") != code_digest(made(0.6), "made")
    assert code_digest(functools.partial(dpo, 1), "p") != code_digest(functools.partial(dpo, 2), "p")
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert code_digest(dpo, "dpo") != before
    helper = code_digest(made(0.5), "made")
    monkeypatch.setitem(globals(), "ratio", dpo)  # a function that it calls
    assert code_digest(made(0.5), "made") != helper


def test_a_module_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses_of_mine.py").write_text("def one(x):\n    return -x.chosen_logps\n")
    named = TrainConfig(loss_type="losses_of_mine:one, sigmoid").loss_type  # type: ignore[arg-type]
    assert named == ("losses_of_mine:one", "sigmoid")
    assert isinstance(named[0], OwnLoss)
    assert named[0].function.__name__ == "one"
    assert TrainConfig(loss_type=named).model_dump(mode="json")["loss_type"] == ["losses_of_mine:one", "sigmoid"]
    for name, said in (("losses_of_mine:two", "functions there: one"), ("no_such:one", "No module named")):
        with pytest.raises(UserError, match=said):
            _ = OwnLoss(name).function
