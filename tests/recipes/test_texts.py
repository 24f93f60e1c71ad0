"""What is scored, from files to training: turns of others inside a response, and the tokenizer that SFT used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, tree, write_jsonl

from dpoeng.cache.exchange.export import export_view
from dpoeng.cache.exchange.importing import import_rows
from dpoeng.cache.exchange.merging import merge
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.shard import encode_shard
from dpoeng.cache.store import Store
from dpoeng.cache.verify import verify
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.models.tokenizer import choose_tokenizer, load_chosen, remark_on
from dpoeng.engine.recipes.check import check_pairs
from dpoeng.engine.recipes.compare import encode_prompt
from dpoeng.engine.recipes.evaluate import find_trained, load_trained
from dpoeng.engine.recipes.merge import merge as merge_adapter
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runtime.progress import NoProgress

CASES = Path(__file__).resolve().parents[1] / "data" / "cases"


def turns(count: int) -> list[dict[str, Any]]:
    """Conversations whose responses have a question of the user in their middle."""

    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = []
    for i in range(count):
        prompt = [say("user", f"Hi, number {i}")]
        sides = (
            [say("assistant", f"{word} {i}"), say("user", "and then?"), say("assistant", f"{word} again")]
            for word in ("Tides", "No")
        )
        chosen, rejected = sides
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def precompute(pairs: Path, model: Path, cache: Path, **fields: Any) -> PrecomputeSummary:
    return precompute_reference(
        PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache, batch_tokens=200, **fields)
    )


@pytest.fixture(scope="module")
def turns_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    summary = precompute(write_jsonl(folder / "pairs.jsonl", turns(6)), tiny_model, folder / "cache")
    assert summary.data.counts.turns == 6
    return folder / "cache"


def test_tokens_of_others_are_read_and_not_scored(turns_cache: Path, tiny_model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    view = View.open(turns_cache)
    for i in range(len(view)):
        row = view[i]
        for own, start, gaps, logps in (
            (row.ids.chosen_ids, row.ids.chosen_start, row.ids.chosen_gaps, row.chosen_logps),
            (row.ids.rejected_ids, row.ids.rejected_start, row.ids.rejected_gaps, row.rejected_logps),
        ):
            (gap,) = gaps
            assert (
                tokenizer.decode(own[gap[0] : gap[1]])
                == "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
            )
            places = [at for at in range(start, len(own)) if not gap[0] <= at < gap[1]]
            tokens = torch.from_numpy(np.concatenate([row.ids.prompt_ids, own]).astype(np.int64))
            with torch.inference_mode():
                plain = lm(tokens[None]).logits[0].double().log_softmax(-1)
            before = len(row.ids.prompt_ids)
            expected = [float(plain[before + at - 1, tokens[before + at]]) for at in places]
            np.testing.assert_allclose(logps, expected, atol=1e-4, rtol=0)
    assert verify(turns_cache, depth="all").ok
    assert (turns_cache / "FORMAT").read_bytes() == b"dpoeng-refcache 2\n"


def test_training_honours_the_same_tokens(turns_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(cache=turns_cache, output_dir=tmp_path / "out", max_steps=2, per_device_train_batch_size=2)
    train(config)
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    first = next(line for line in lines if "loss" in line)
    assert abs(first["loss"] - np.log(2)) < 1e-3  # the policy is the reference: every log-ratio is 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["parity"]["pairs"] > 0


def test_gaps_go_through_export_import_and_merge(turns_cache: Path, tmp_path: Path) -> None:
    view = View.open(turns_cache)
    for suffix in (".jsonl", ".parquet"):
        export_view(view, tmp_path / f"out{suffix}")
        store = Store.open(tmp_path / f"b{suffix}", create=True)
        assert import_rows(store, view.spec, tmp_path / f"out{suffix}", "back").rows == 6
        back = View.open(tmp_path / f"b{suffix}", "back")
        for i in range(6):
            assert back[i].ids.same_as(view[i].ids)
            assert back[i].chosen_logps.tobytes() == view[i].chosen_logps.tobytes()
    target = Store.open(tmp_path / "merged", create=True)
    merge(target, Store.open(turns_cache))
    assert (tmp_path / "merged" / "FORMAT").read_bytes() == b"dpoeng-refcache 2\n"
    assert verify(tmp_path / "merged", depth="all").ok


def test_gaps_make_another_pair_and_must_lie_between_scored_tokens() -> None:
    ids = [as_ids(part) for part in ([1, 2], [3, 4, 5, 6], [7, 8])]
    plain, gapped = PairIds(*ids), PairIds(*ids, chosen_gaps=((1, 2),))
    assert pair_key(plain) != pair_key(gapped)
    assert pair_key(gapped.swapped().swapped()) == pair_key(gapped)
    logps = np.full(3, -1.0, np.float32), np.full(2, -1.0, np.float32)
    ScoredPair(gapped, *logps).check()
    for gaps in (((0, 1),), ((3, 4),), ((1, 1),), ((2, 3), (1, 2)), ((1, 2), (2, 3)), ((1, 9),)):
        with pytest.raises(ValueError, match="gaps"):
            ScoredPair(PairIds(*ids, chosen_gaps=gaps), *logps).check()
    one = ScoredPair(plain, np.full(4, -1.0, np.float32), logps[1])
    both = bytes(encode_shard([one, ScoredPair(gapped, *logps)]))
    assert b"chosen_gaps" in both
    assert b"chosen_gaps" not in bytes(encode_shard([one]))


# ----------------------------------------------------------------------------------- the SFT adapter's own tokenizer


@pytest.fixture
def sft_with_tokenizer(tmp_path: Path, sft_adapter: Path, tokenizer: Any) -> Path:
    """The SFT adapter as trainers save it: beside it the tokenizer, with its own template and end token."""
    folder = tmp_path / "sft"
    shutil.copytree(sft_adapter, folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    return folder


class Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def decoded(cache: Path, tokenizer: Any) -> list[str]:
    view = View.open(cache)
    return [tokenizer.decode([*view[i].ids.prompt_ids, *view[i].ids.chosen_ids]) for i in range(len(view))]


PAIRS_46 = CASES / "46-adapter-tokenizer" / "p.jsonl"
WRITTEN_46 = [
    "### user:\nName a colour.<|im_end|>\n### assistant:\nRed.<|im_end|>\n",
    "Instruction: Name a colour.\nResponse: Red.<|im_end|>",
]


def test_46_what_stands_beside_the_adapter_is_used_by_all(
    tmp_path: Path, tiny_model: Path, sft_with_tokenizer: Path, tokenizer: Any
) -> None:
    notes = Notes()
    cache = tmp_path / "cache"
    config = PrecomputeConfig(pairs=(PAIRS_46,), model=str(tiny_model), adapter=str(sft_with_tokenizer), cache=cache)
    precompute_reference(config, notes)
    assert decoded(cache, tokenizer) == WRITTEN_46
    told = [note for note in notes.notes if "tokenizer of" in note]
    assert len(told) == 1
    assert "chat template" in told[0]
    assert "special tokens (eos_token)" in told[0]

    # check shows the same texts, and says the same
    report = check_pairs(config)
    assert ["".join(piece.text for piece in pair.chosen) for pair in report.shown] == WRITTEN_46
    assert report.tokenizer == str(sft_with_tokenizer)
    assert "other-tokenizer" in {finding.code for finding in report.findings}

    # run.json and the saved result
    out = tmp_path / "out"
    train(TrainConfig(cache=cache, output_dir=out, max_steps=1))
    assert json.loads((out / "run.json").read_text())["reference"]["tokenizer"] == str(sft_with_tokenizer)
    result = choose_tokenizer(find_model(str(tiny_model)), str(out / "adapter"), None)
    saved = load_chosen(result)
    assert (saved.eos_token, saved.chat_template) == (
        "<|im_end|>",
        (sft_with_tokenizer / "chat_template.jinja").read_text(),
    )

    # and what is generated
    settings = TrainConfig(cache=cache, output_dir=out)
    lm = load_trained(find_trained(out), settings, View.open(cache), tokenizer=True)
    prompt = encode_prompt(lm.tokenizer, "Name a colour.", chat=True, prompt_format=None)
    assert tokenizer.decode(prompt) == "### user:\nName a colour.<|im_end|>\n### assistant:\n"

    # and a merged checkpoint
    merge_adapter(find_model(str(tiny_model)), [find_adapter(str(out / "adapter"))], tmp_path / "merged")
    merged = load_chosen(choose_tokenizer(find_model(str(tmp_path / "merged")), None, None))
    assert (merged.eos_token, merged.chat_template) == (saved.eos_token, saved.chat_template)


def test_46_a_named_tokenizer_wins_and_an_equal_one_is_not_mentioned(
    tmp_path: Path, tiny_model: Path, sft_with_tokenizer: Path, sft_adapter: Path, tokenizer: Any
) -> None:
    fields = {"adapter": str(sft_with_tokenizer), "tokenizer": str(tiny_model)}
    precompute(PAIRS_46, tiny_model, tmp_path / "cache", **fields)
    first = decoded(tmp_path / "cache", tokenizer)[0]
    assert first == "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
    model = find_model(str(tiny_model))
    for adapter, named in ((None, None), (str(sft_adapter), None), (str(sft_with_tokenizer), str(tiny_model))):
        choice = choose_tokenizer(model, adapter, named)
        assert remark_on(choice, load_chosen(choice)) == ""


def test_46_a_checkpoint_has_its_tokenizer_in_the_folder_above(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, tokenizer: Any
) -> None:
    out = tmp_path / "sft-run"
    shutil.copytree(sft_adapter, out / "checkpoint-500")
    tokenizer.save_pretrained(out)
    choice = choose_tokenizer(find_model(str(tiny_model)), str(out / "checkpoint-500"), None)
    assert choice.source.folder == out.resolve()
    # a template alone goes with the base's tokenizer
    alone = tmp_path / "template-only"
    shutil.copytree(sft_adapter, alone)
    (alone / "chat_template.jinja").write_text("{{ messages[0].content }}")
    choice = choose_tokenizer(find_model(str(tiny_model)), str(alone), None)
    assert load_chosen(choice).chat_template == "{{ messages[0].content }}"


def test_a_cache_without_gaps_stays_in_the_first_format(tmp_path: Path, tiny_model: Path) -> None:
    precompute(write_jsonl(tmp_path / "p.jsonl", pair_rows(4)), tiny_model, tmp_path / "cache")
    assert (tmp_path / "cache" / "FORMAT").read_bytes() == b"dpoeng-refcache 1\n"
    before = tree(tmp_path / "cache", "objects")
    precompute(write_jsonl(tmp_path / "q.jsonl", turns(2)), tiny_model, tmp_path / "cache")
    assert before.items() <= tree(tmp_path / "cache", "objects").items()
    assert len(View.open(tmp_path / "cache", "p")) == 4
