"""GGUF files: weights, config and token ids come out as they went in, and a converted checkpoint is an ordinary one."""

from __future__ import annotations

import itertools
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from processes import start_process

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.gguf import (
    CONVERTED_FROM,
    UntestedTokenizerWarning,
    convert_gguf,
    load_gguf,
    load_gguf_tokenizer,
    read_metadata,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ċ Ċ", "Ġ Ġ", "Ġ a", "1 2")  # newlines, spaces, a word, two digits
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
EPS = 1e-5
GgufMaker = Callable[..., tuple[Path, Any]]


def byte_letters() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in the order of the bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def make_gguf(tmp_path: Path) -> GgufMaker:
    """Write a two-layer Llama with random weights as GGUF; gives the path and the model it was written from."""
    counter = itertools.count()

    def make(pre: str | None = "smollm", *, context: int = 128) -> tuple[Path, Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        letters = byte_letters()
        tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]
        config = LlamaConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=context, rms_norm_eps=EPS,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        path = tmp_path / f"tiny-{next(counter)}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_context_length(context)
        writer.add_block_count(2)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(48)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(EPS)
        writer.add_rope_freq_base(50_000.0)
        writer.add_rope_dimension_count(8)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
        writer.add_token_merges(list(MERGES))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_chat_template(TEMPLATE)
        names = {
            "model.embed_tokens": "token_embd", "model.norm": "output_norm",
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "model.layers": "blk",
        }  # fmt: skip
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight":
                continue  # tied
            array = tensor.numpy()
            if "q_proj" in name or "k_proj" in name:
                array = permuted(array, 4 if "q_proj" in name else 2)
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    return make


def test_weights_logits_and_config_are_those_that_were_written(make_gguf: GgufMaker) -> None:
    path, original = make_gguf()
    model, tokenizer = load_gguf(path, torch.float32)

    want, got = original.state_dict(), model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # GGUF keeps 1e-5 in float32, whose nearest double is 9.999999747378752e-06.
    assert model.config.rms_norm_eps == EPS
    assert model.config.rope_parameters["rope_theta"] == 50_000.0
    assert not hasattr(model.config, "quantization_config")
    assert not model.training
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"


def test_dtype_is_the_one_asked_for(make_gguf: GgufMaker) -> None:
    path, original = make_gguf()
    model, _ = load_gguf(path, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    want = original.model.layers[1].self_attn.k_proj.weight.to(torch.bfloat16)
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, want)


# What each splitter must do where they differ: "smollm" takes every digit alone before GPT-2's pattern sees the text,
# so white space before a digit stays together; GPT-2's pattern leaves the last white space to what follows and keeps
# digits together. Worked out by hand from the two patterns and the four merges.
@pytest.mark.parametrize(
    ("pre", "text", "want"),
    [
        ("smollm", "a\n\n12", ["a", "ĊĊ", "1", "2"]),
        ("gpt-2", "a\n\n12", ["a", "Ċ", "Ċ", "12"]),
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ", "12"]),
        ("smollm", "x  a", ["x", "Ġ", "Ġa"]),
        ("gpt-2", "x  a", ["x", "Ġ", "Ġa"]),
        ("smollm", "<|im_end|>12", ["<|im_end|>", "1", "2"]),
    ],
)
def test_text_is_split_as_the_file_names_it(make_gguf: GgufMaker, pre: str, text: str, want: list[str]) -> None:
    path, _ = make_gguf(pre)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_gguf_tokenizer(path)
    assert tokenizer.tokenize(text) == want
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("pre", ["nobody-knows-this", None])
def test_an_unknown_splitter_is_said(make_gguf: GgufMaker, pre: str | None) -> None:
    path, _ = make_gguf(pre)
    with pytest.warns(UntestedTokenizerWarning, match=repr(pre)):
        load_gguf_tokenizer(path)


def test_a_splitter_that_transformers_knows_is_left_to_it(make_gguf: GgufMaker) -> None:
    path, _ = make_gguf("llama-bpe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_gguf_tokenizer(path)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "12"]  # up to three digits together, newlines together


def test_a_converted_checkpoint_loads_as_any_other(make_gguf: GgufMaker, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, original = make_gguf()
    out = convert_gguf(path, tmp_path / "deep" / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == TEMPLATE
    assert not list((tmp_path / "deep").glob(".*")), "the working folder is gone"


def convert_elsewhere(path: Path, out: Path) -> None:
    warnings.simplefilter("ignore")
    convert_gguf(path, out, torch.float32)


def test_converting_in_two_processes_gives_the_same_bytes(make_gguf: GgufMaker, tmp_path: Path) -> None:
    path, _ = make_gguf()
    here = convert_gguf(path, tmp_path / "here", torch.float32)
    # Another hash seed: nothing may depend on the order of a set.
    process = start_process(convert_elsewhere, path, tmp_path / "there")
    process.join(240)
    assert process.exitcode == 0
    names = sorted(file.name for file in here.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", CONVERTED_FROM} <= set(names)
    assert names == sorted(file.name for file in (tmp_path / "there").iterdir())
    for name in names:
        assert (here / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_converting_again_touches_nothing_and_never_replaces_something_else(
    make_gguf: GgufMaker, tmp_path: Path
) -> None:
    path, _ = make_gguf()
    out = convert_gguf(path, tmp_path / "model", torch.float32)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    convert_gguf(path, out, torch.float32)
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}

    with pytest.raises(UserError, match="gguf-output-exists"):
        convert_gguf(path, out, torch.bfloat16)
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 4000])  # nothing, half the magic, half the head, mid-key, mid-array
def test_a_cut_off_file_is_one_clear_error(make_gguf: GgufMaker, keep: int) -> None:
    path, _ = make_gguf()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="gguf-format") as caught:
        load_gguf(path, torch.float32)
    assert str(path) in str(caught.value)


def test_a_file_cut_off_in_its_weights_is_one_clear_error(make_gguf: GgufMaker) -> None:
    path, _ = make_gguf()
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="gguf-unsupported"):
        load_gguf(path, torch.float32)


def test_what_is_not_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"\x80\x04PK" + bytes(64))
    with pytest.raises(UserError, match="not a readable GGUF file"):
        load_gguf(other, torch.float32)
    with pytest.raises(UserError, match="gguf-missing"):
        load_gguf(tmp_path / "absent.gguf", torch.float32)


def test_an_enormous_length_is_refused_before_memory_is_asked_for(make_gguf: GgufMaker, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.gguf"
    key = b"general.name"
    # One pair whose string claims 2**60 bytes.
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    pair = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    bomb.write_bytes(head + pair)
    with pytest.raises(UserError, match="gguf-format"):
        read_metadata(bomb)


def test_metadata_holds_scalars_and_array_lengths(make_gguf: GgufMaker) -> None:
    path, original = make_gguf()
    metadata = read_metadata(path)
    assert metadata["general.architecture"] == "llama"
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["llama.block_count"] == 2
    assert metadata["tokenizer.ggml.tokens"] == original.config.vocab_size
    assert metadata["tokenizer.ggml.merges"] == len(MERGES)
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == float(np.float32(EPS))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demos_model_splits_text_as_in_training_and_knows_the_capital_of_france(demo_model: Path) -> None:
    from dpoeng.engine.models.generate import generate
    from dpoeng.engine.models.loading import load_model
    from dpoeng.engine.models.model import set_mode
    from dpoeng.engine.models.sources import find_model

    lm = load_model(find_model(str(demo_model)), quantization="none", dtype="float32", device=torch.device("cpu"))
    set_mode(lm, training=False)
    # The published tokenizer: single digits, GPT-2's pattern for the rest, white space before a digit kept together.
    assert lm.tokenizer.tokenize("In 1848:\n\n1. a  2") == [
        *("In", "Ġ", "1", "8", "4", "8", ":", "ĊĊ", "1", ".", "Ġa", "ĠĠ", "2"),
    ]
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = lm.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    (answer,) = generate(lm, [np.array(ids, dtype=np.int32)], max_new_tokens=16)
    assert answer == "The capital of France is Paris."


@pytest.mark.parametrize("length", [2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [4, 8, 9, 10])
def test_lengths_that_no_file_has_are_refused(tmp_path: Path, kind: int, length: int) -> None:
    path = tmp_path / "a.gguf"
    key = struct.pack("<Q", 1) + b"k"
    content = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IIQ", 9, kind, length)
    path.write_bytes(content + struct.pack("<Q", length) + bytes(100))
    with pytest.raises(UserError) as caught:
        read_metadata(path)
    assert caught.value.code == "gguf-format"


def test_arrays_within_arrays_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    nested = struct.pack("<IQ", 9, 1) * 50_000
    path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1) + b"k" + struct.pack("<I", 9) + nested)
    with pytest.raises(UserError, match="nested too deeply"):
        read_metadata(path)
