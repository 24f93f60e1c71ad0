"""Makes the workload: your model and pairs, or a random Llama and pairs of real lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import IdArray, PairIds, as_ids, pair_key
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.engine.models.sources import ModelSource, find_model

# Tokens of (prompt, chosen, rejected) of 64 pairs: every 23rd of 1,500 pairs of Anthropic's hh-rlhf (harmless-base),
# sorted by length, as a chat, tokenised for SmolLM2-135M-Instruct, at most 512 tokens a side. Means of the 64: 140,
# 40 and 54; of all: 144, 40 and 51. Real triples, because the three lengths are not independent.
REAL_LENGTHS = (
    *((38, 6, 15), (43, 9, 14), (43, 9, 21), (46, 18, 16), (49, 22, 13), (38, 31, 18), (49, 29, 13), (65, 20, 12)),
    *((61, 14, 25), (89, 6, 9), (100, 4, 5), (64, 28, 21), (79, 26, 12), (54, 25, 41), (89, 26, 13), (42, 44, 46)),
    *((45, 75, 17), (123, 4, 14), (98, 13, 34), (109, 23, 17), (42, 20, 91), (55, 11, 92), (90, 29, 44), (46, 85, 35)),
    *((41, 119, 11), (85, 46, 44), (159, 11, 10), (126, 28, 29), (155, 26, 9), (91, 16, 87), (102, 21, 74)),
    *((47, 118, 36), (162, 11, 33), (138, 41, 32), (126, 52, 39), (85, 21, 116), (186, 16, 26), (170, 39, 23)),
    *((44, 39, 154), (194, 15, 33), (190, 22, 35), (168, 28, 57), (44, 65, 150), (143, 28, 96), (38, 196, 40)),
    *((235, 27, 22), (157, 31, 101), (157, 57, 86), (237, 11, 64), (170, 26, 127), (209, 61, 64), (292, 17, 34)),
    *((241, 57, 56), (259, 62, 45), (151, 121, 105), (159, 96, 142), (325, 64, 27), (143, 34, 255), (252, 50, 150)),
    *((291, 73, 111), (272, 121, 106), (498, 14, 14), (451, 38, 61), (426, 86, 86)),
)


VIEW = "bench"


def seal_view(store: Store, digest: str, pairs: Sequence[PairIds]) -> None:
    """Finishes phase one by hand: seals the committed rows and writes the view `VIEW` of these pairs."""
    store.seal(digest)
    entries = [ViewEntry("bench", i + 1, pair_key(pair), {}) for i, pair in enumerate(pairs)]
    store.write_view(digest, VIEW, entries, {})


def model_or_embedded(
    model: str | None, folder: Path, files: Sequence[Path] = (), *, layers: int = 6, width: int = 576
) -> ModelSource:
    """The named model, or the built-in one, made in `folder`.

    Raises:
        UserError: no such model; or files of pairs are named without a model whose tokenizer could read them.
    """
    if model is not None:
        return find_model(model)
    if files:
        raise UserError(
            "the built-in model has no tokenizer to read pairs with",
            code="tokenizer-missing",
            where=f"--pairs {files[0]}",
            expected="--model with it",
            remedy="name your model with --model, or leave --pairs out for synthetic pairs of real lengths",
        )
    return find_model(str(save_small_model(folder / "model", layers=layers, width=width)))


def first_pairs_of(
    files: Sequence[Path], source: ModelSource, count: int, *, vocabulary: int, max_length: int
) -> list[PairIds]:
    """The first `count` usable pairs of some files, by the model's tokenizer; without files synthetic ones.

    Raises:
        UserError: the files or the tokenizer are not usable.
    """
    if not files:
        return synthetic_pairs(count, vocabulary)
    from dpoeng.engine.data.pairs import read_pairs
    from dpoeng.engine.data.tokenization import tokenize_pairs
    from dpoeng.engine.models.tokenizer import load_tokenizer

    rows = read_pairs(files).pairs[: 2 * count]
    data = tokenize_pairs(rows, load_tokenizer(source), max_length=max_length)
    return [pair.ids for pair in data.pairs][:count]


def synthetic_pairs(count: int, vocabulary: int, *, seed: int = 0) -> list[PairIds]:
    """Pairs of random token ids: the real lengths in random order, repeated until there are `count`."""
    random = np.random.default_rng(seed)
    lengths: list[tuple[int, int, int]] = []
    while len(lengths) < count:
        lengths += [REAL_LENGTHS[i] for i in random.permutation(len(REAL_LENGTHS))]

    def draw(length: int) -> IdArray:
        return as_ids(random.integers(0, vocabulary, length))

    return [PairIds(draw(prompt), draw(chosen), draw(rejected)) for prompt, chosen, rejected in lengths[:count]]


def save_small_model(folder: Path, *, layers: int = 6, width: int = 576, vocabulary: int = 49152) -> Path:
    """A random Llama of SmolLM2-135M's shape, but with fewer of its 30 layers; 192 MB in float32.

    Args:
        folder: folder to save it in.
        layers: decoder layers.
        width: hidden size, a multiple of 64; heads and MLP grow with it.
        vocabulary: rows of the tied embedding.
    """
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=64 * round(8 * width / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=1 if width % 192 else width // 192,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def unique_tokens(pairs: Sequence[PairIds]) -> int:
    """Tokens when each prompt runs once: the minimum of any method."""
    return sum(pair.total_tokens for pair in pairs)


def padded_tokens(pairs: Sequence[PairIds]) -> int:
    """Positions of the usual layout: prompt + chosen and prompt + rejected, all padded to the longest of the batch."""
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    return 2 * len(pairs) * longest
