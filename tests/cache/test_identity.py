"""What makes two references the same: weights by tensor and bytes, and the fields of the spec. Faults 46 to 55, 82."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from safetensors.numpy import save_file

from dpoeng.cache import fingerprint
from dpoeng.cache.errors import CacheError
from dpoeng.cache.fingerprint import TensorDigest, combined_digest, weight_digests
from dpoeng.cache.spec import ABSENT, FieldChange, ReferenceSpec, diff_specs, explain_miss

Tensors = dict[str, npt.NDArray[Any]]


def tensors(seed: int = 0) -> Tensors:
    """One of each kind that could go wrong: two dtypes, a scalar, an empty tensor, odd sizes."""
    random = np.random.default_rng(seed)
    return {
        "model.embed": random.standard_normal((7, 3)).astype(np.float32),
        "model.layers.0.w": random.standard_normal((3, 5)).astype(np.float16),
        "model.layers.1.w": random.integers(-128, 127, (5, 3), dtype=np.int8),
        "scale": np.array(2.0, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
    }


def saved(path: Path, content: Mapping[str, npt.NDArray[Any]]) -> Path:
    save_file(dict(content), path)
    return path


def test_digests_are_the_hashes_of_the_tensors_bytes(tmp_path: Path) -> None:
    made = tensors()
    found = weight_digests([saved(tmp_path / "a.safetensors", made)])
    names = {"float32": "F32", "float16": "F16", "int8": "I8"}
    assert found == {
        name: TensorDigest(names[str(array.dtype)], array.shape, xxhash.xxh3_128_hexdigest(array.tobytes()))
        for name, array in made.items()
    }
    assert list(found) == sorted(made)


def test_resharding_and_metadata_do_not_count(tmp_path: Path) -> None:
    """Fault 49."""
    made = tensors()
    whole = weight_digests([saved(tmp_path / "whole.safetensors", made)])
    items = list(made.items())
    for cut in range(1, len(items)):
        parts = [
            saved(tmp_path / f"{cut}-1.safetensors", dict(items[:cut])),
            saved(tmp_path / f"{cut}-2.safetensors", dict(items[cut:])),
        ]
        for order in (parts, parts[::-1]):
            assert weight_digests(order) == whole
            assert combined_digest(weight_digests(order)) == combined_digest(whole)
    save_file(made, tmp_path / "noted.safetensors", metadata={"format": "pt", "saved_by": "somebody"})
    assert weight_digests([tmp_path / "noted.safetensors"]) == whole


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """Fault 47: a flipped bit of the data changes a digest; one of the header does, or makes the file unreadable."""
    path = saved(tmp_path / "a.safetensors", {"w": np.arange(6, dtype=np.float32), "v": np.ones((2, 1), np.int8)})
    data = path.read_bytes()
    before = combined_digest(weight_digests([path]))
    missed = []
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                after = combined_digest(weight_digests([path]))
            except CacheError:
                continue
            if after == before:
                missed.append((place, bit))
    assert missed == []


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made | {"model.embed": made["model.embed"].reshape(3, 7)},
        lambda made: made | {"model.layers.0.w": made["model.layers.0.w"].view(np.int16)},
        lambda made: {("renamed" if name == "scale" else name): array for name, array in made.items()},
        lambda made: made | {"more": np.zeros(1, np.float32)},
        lambda made: {name: array for name, array in made.items() if name != "nothing"},
    ],
    ids=["shape", "dtype", "name", "one more", "one less"],
)
def test_name_dtype_and_shape_count_as_well_as_bytes(tmp_path: Path, change: Any) -> None:
    before = weight_digests([saved(tmp_path / "a.safetensors", tensors())])
    after = weight_digests([saved(tmp_path / "b.safetensors", change(tensors()))])
    assert combined_digest(before) != combined_digest(after)


def test_progress_ends_at_all_the_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", tensors())
    seen: list[tuple[int, int]] = []
    weight_digests([path], progress=lambda done, total: seen.append((done, total)), memo=tmp_path / "memo")
    assert [total for _, total in seen] == [path.stat().st_size] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == path.stat().st_size


# -- files that are not weights ---------------------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


BAD = {
    "empty": b"",
    "short": b"abc",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "header longer than 100 MB": (200_000_000).to_bytes(8, "little") + b"{}",
    "header is a list": raw([1]),
    "header is no JSON": raw(b"{no}"),
    "header nested deep": raw(b'{"a":' * 100_000),
    "tensor twice": raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"x"),
    "hole": raw({"a": entry(0, 1), "b": entry(2, 3)}, b"xyz"),
    "overlap": raw({"a": entry(0, 2), "b": entry(1, 3)}, b"xyz"),
    "past the end": raw({"a": entry(0, 4)}, b"xyz"),
    "bytes left over": raw({"a": entry(0, 2)}, b"xyz"),
    "backwards": raw({"a": entry(0, 3), "b": entry(3, 1, shape=[2])}, b"xyz"),
    "shape of another size": raw({"a": entry(0, 3, shape=[4])}, b"xyz"),
    "negative shape": raw({"a": entry(0, 4, shape=[-2, -2])}, b"wxyz"),
    "unknown dtype": raw({"a": entry(0, 3, dtype="Q3")}, b"xyz"),
    "no offsets": raw({"a": {"dtype": "U8", "shape": [1]}}, b"x"),
    "pickle": b"\x80\x02ctorch._utils\n" + bytes(100),
    "GGUF cut": b"GGUF\x03\0\0\0" + b"\x01" + bytes(7) + b"\xff" * 8,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_without_weights_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(BAD[kind])
    with pytest.raises(CacheError) as caught:
        weight_digests([path])
    assert (caught.value.code, caught.value.where) == ("weights-bad", str(path))
    assert caught.value.expected
    assert caught.value.found


def test_a_missing_file_and_a_tensor_in_two_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="weights-bad"):
        weight_digests([tmp_path / "none.safetensors"])
    one = saved(tmp_path / "1.safetensors", tensors())
    two = saved(tmp_path / "2.safetensors", {"scale": np.zeros(1, np.float32)})
    with pytest.raises(CacheError) as caught:
        weight_digests([one, two])
    assert caught.value.found == "scale in a second one"


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", tensors())

    def meddle(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        os.utime(path, ns=(1, 1))

    with pytest.raises(CacheError) as caught:
        weight_digests([path], progress=meddle)
    assert caught.value.found == "one that changed while it was hashed"


# -- remembered digests -----------------------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass, so that files just written have settled."""
    monkeypatch.setattr(fingerprint, "time", SimpleNamespace(time_ns=lambda: time.time_ns() + 10_000_000_000))


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise AssertionError(f"{file} was read")

    monkeypatch.setattr(fingerprint, "_mapped", refuse)


@pytest.mark.usefixtures("later")
def test_a_remembered_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", tensors())
    first = weight_digests([path], memo=tmp_path / "memo")
    refuse_to_read(monkeypatch)
    assert weight_digests([path], memo=tmp_path / "memo") == first


@pytest.mark.usefixtures("later")
def test_an_edit_of_the_same_size_with_its_time_put_back_is_seen(tmp_path: Path) -> None:
    """Fault 48: nobody can put back ctime."""
    path = saved(tmp_path / "a.safetensors", tensors())
    before = path.stat()
    first = weight_digests([path], memo=tmp_path / "memo")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    second = weight_digests([path], memo=tmp_path / "memo")
    assert second != first
    assert second == weight_digests([path])


def test_a_young_file_and_one_from_the_future_are_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 46 too: a clock set back makes files look as if they came from the future."""
    path = saved(tmp_path / "a.safetensors", tensors())
    for shift_s in (0, 1, -3600):
        clock = SimpleNamespace(time_ns=lambda shift_s=shift_s: path.stat().st_ctime_ns + shift_s * 1_000_000_000)
        monkeypatch.setattr(fingerprint, "time", clock)
        weight_digests([path], memo=tmp_path / "memo")
        assert not (tmp_path / "memo").exists()
    monkeypatch.setattr(fingerprint, "time", SimpleNamespace(time_ns=lambda: path.stat().st_ctime_ns + 3_000_000_000))
    weight_digests([path], memo=tmp_path / "memo")
    assert len(list((tmp_path / "memo").iterdir())) == 1


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("how", ["cut", "flipped", "of another file", "empty", "a folder"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, how: str) -> None:
    path = saved(tmp_path / "a.safetensors", tensors())
    first = weight_digests([path], memo=tmp_path / "memo")
    [memory] = (tmp_path / "memo").iterdir()
    data = memory.read_bytes()
    match how:
        case "cut":
            memory.write_bytes(data[:-1])
        case "flipped":
            memory.write_bytes(data.replace(b"F32", b"F16", 1))
        case "empty":
            memory.write_bytes(b"")
        case "a folder":
            memory.unlink()
            memory.mkdir()
        case "of another file":
            weight_digests([saved(tmp_path / "b.safetensors", tensors(1))], memo=tmp_path / "other")
            [other] = (tmp_path / "other").iterdir()
            memory.write_bytes(other.read_bytes())
    assert weight_digests([path], memo=tmp_path / "memo") == first


@pytest.mark.usefixtures("later")
def test_a_memory_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", tensors())
    (tmp_path / "memo").write_text("a file where the folder should be")
    assert weight_digests([path], memo=tmp_path / "memo") == weight_digests([path])


# -- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, *, theta: float = 1e4, tokens: str = "ab", name: str = "x", flip: bool = False) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_rope_freq_base(theta)
    writer.add_token_list(list(tokens))
    weights = np.arange(64, dtype=np.float32).reshape(2, 32)
    weights[1, 7] += flip
    writer.add_tensor("token_embd.weight", weights)
    writer.add_tensor(
        "output.weight",
        gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_counts_tensors_and_settings_but_not_names_and_tokens(tmp_path: Path) -> None:
    base = weight_digests([write_gguf(tmp_path / "base.gguf")])
    assert list(base) == ["gguf:metadata", "output.weight", "token_embd.weight"]
    weights = np.arange(64, dtype=np.float32)
    assert base["token_embd.weight"].xxh3_128 == xxhash.xxh3_128_hexdigest(weights.tobytes())
    assert base["output.weight"].dtype == "Q8_0"
    assert weight_digests([write_gguf(tmp_path / "n.gguf", name="y", tokens="cd")]) == base
    assert weight_digests([write_gguf(tmp_path / "f.gguf", flip=True)]) != base
    theta = weight_digests([write_gguf(tmp_path / "t.gguf", theta=1e6)])
    assert [name for name in base if base[name] != theta[name]] == ["gguf:metadata"]


# -- specs ------------------------------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {
    "weights": {"w": ["F32", [2, 3], "0" * 32], "v": ["F32", [1], "1" * 32]},
    "adapter": {"lora_alpha": 16, "tensors": None},
    "dtype": "bfloat16",
    "attention": "sdpa",
    "rope_theta": 500000.0,
}


def test_the_digest_depends_on_values_not_on_how_they_are_written() -> None:
    reordered = json.loads(json.dumps(dict(reversed(FIELDS.items()))))
    reordered["rope_theta"] = 500000
    reordered["weights"]["w"] = ("F32", (2, 3), "0" * 32)
    spec = ReferenceSpec.from_fields(FIELDS)
    assert ReferenceSpec.from_fields(reordered) == spec
    assert ReferenceSpec.from_json(spec.to_json()) == spec
    assert ReferenceSpec.from_fields(spec.fields).digest == spec.digest == xxhash.xxh3_128_hexdigest(spec.canonical)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("weights", "w"), ["F32", [2, 3], "2" * 32]),
        (("adapter", "lora_alpha"), 32),  # fault 50
        (("adapter", "tensors"), "3" * 32),
        (("dtype",), "float16"),  # fault 54
        (("attention",), "eager"),
        (("rope_theta",), 500000.5),
        (("adapter", "lora_alpha"), True),
        (("adapter", "lora_alpha"), "16"),
        (("new",), None),
    ],
)
def test_every_field_counts_and_the_diff_names_exactly_it(path: tuple[str, ...], value: Any) -> None:
    fields = json.loads(json.dumps(FIELDS))
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    before = inner.get(path[-1], ABSENT)
    inner[path[-1]] = value
    old, new = ReferenceSpec.from_fields(FIELDS), ReferenceSpec.from_fields(fields)
    assert old.digest != new.digest
    assert diff_specs(old, new) == [FieldChange(".".join(path), before, value)]
    assert diff_specs(new, old) == [FieldChange(".".join(path), value, before)]
    assert diff_specs(new, new) == []


def test_true_is_not_one() -> None:
    [change] = diff_specs(ReferenceSpec.from_fields({"x": 1}), ReferenceSpec.from_fields({"x": True}))
    assert (change.old, change.new) == (1, True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"": {"a": 1}}, {"a": 1}),
        ({}, {"a": ABSENT}),
        ({"a": {}}, {}),
        ({"a": {}}, {"a": []}),
    ],
)
def test_fields_that_only_look_alike_differ(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert diff_specs(ReferenceSpec.from_fields(one), ReferenceSpec.from_fields(other))


def test_a_miss_is_explained_by_the_nearest_spec() -> None:
    near = ReferenceSpec.from_fields({**FIELDS, "dtype": "float32"})
    far = ReferenceSpec.from_fields({"dtype": "float32"})
    wanted = ReferenceSpec.from_fields(FIELDS)
    explained = explain_miss(wanted, {spec.digest: spec for spec in (far, near, wanted)})
    assert explained == (near.digest, [FieldChange("dtype", "float32", "bfloat16")])
    assert explain_miss(wanted, {wanted.digest: wanted}) is None
    assert explain_miss(wanted, {}) is None


def test_a_spec_cannot_be_changed_through_its_fields() -> None:
    spec = ReferenceSpec.from_fields(FIELDS)
    spec.fields["dtype"] = "float16"
    spec.fields["weights"].clear()
    assert spec.fields == FIELDS
    with pytest.raises(AttributeError):
        spec.canonical = b"{}"  # type: ignore[misc]


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": float("inf")}, {"x": b"y"}, {"x": Path("y")}, {1: 2}])
def test_json_without_a_canonical_form_is_refused(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ReferenceSpec.from_fields(bad)


@pytest.mark.parametrize(
    "text", ['{"a": 1}', '{"b":1,"a":1}', '{"a":1,"a":1}', "[]", "1", "", '{"a":1.0}', '{"a":NaN}']
)
def test_a_spec_that_is_not_canonical_is_refused(text: str) -> None:
    with pytest.raises(CacheError):
        ReferenceSpec.from_json(text)


def test_identity_does_not_depend_on_hash_seed_locale_or_threads() -> None:
    """Fault 82."""
    code = (
        "import json,sys; from dpoeng.cache.spec import ReferenceSpec; from dpoeng.cache.schema import *;"
        "print(ReferenceSpec.from_fields(json.loads(sys.argv[1])).digest,"
        "pair_key(PairIds(as_ids([1]), as_ids([2]), as_ids([3]))).hex())"
    )
    settings = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"},
    ]
    said = {
        subprocess.check_output([sys.executable, "-c", code, json.dumps(FIELDS)], env={**os.environ, **setting})
        for setting in settings
    }
    assert len(said) == 1
    assert said.pop().split()[0].decode() == ReferenceSpec.from_fields(FIELDS).digest
