"""Orders and edges of the cache that only a crash at one moment, or a file wrong by a byte, would show."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from dpoeng.bench.cache import SPEC, synthetic_rows
from dpoeng.cache.files import Files
from dpoeng.cache.framing import BLOCK, FramingError, check_plain
from dpoeng.cache.schema import PairIds, as_ids, pair_key
from dpoeng.cache.shard import encode_shard
from dpoeng.cache.store import Store


def test_an_object_is_there_before_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, create=True)
    digest = store.put_spec(SPEC)
    published: list[str] = []
    real = Files.publish

    def noting(self: Files, name: str, data: bytes | memoryview) -> bool:
        published.append(name.split("/")[0])
        return real(self, name, data)

    monkeypatch.setattr(Files, "publish", noting)
    store.commit_shard(digest, synthetic_rows(3), {})
    assert published == ["objects", "runs"]


@pytest.mark.parametrize("more", [1, 8, 1 << 20])
def test_a_batch_may_not_reach_into_the_footer(more: int) -> None:
    """The footer's and the header's size of the only body, raised alike."""
    data = bytearray(encode_shard(synthetic_rows(2)))
    check_plain(memoryview(data))
    (footer_size,) = struct.unpack_from("<i", data, len(data) - 10)
    start = len(data) - 10 - footer_size
    places = [at for at in range(start, len(data) - BLOCK.size, 4) if _is_block(data, at, start)]
    (at,) = places
    offset, metadata_size, body_size = BLOCK.unpack_from(data, at)
    gap = start - (offset + metadata_size + body_size)
    BLOCK.pack_into(data, at, offset, metadata_size, body_size + gap + more)
    header = data[offset : offset + metadata_size]
    place = header.index(struct.pack("<q", body_size))
    struct.pack_into("<q", data, offset + place, body_size + gap + more)
    with pytest.raises(FramingError, match="past the file"):
        check_plain(memoryview(data))


def _is_block(data: bytearray, at: int, start: int) -> bool:
    offset, metadata_size, body_size = BLOCK.unpack_from(data, at)
    return 0 < offset < start and 8 <= metadata_size < start and 0 < body_size < start and offset % 8 == 0


def test_a_key_tells_where_prompt_and_responses_end() -> None:
    """The ids of all of these are 1, 2, 3, 4 in this order."""
    cuts = [(1, 2), (1, 3), (2, 3), (0, 2)]
    pairs = [PairIds(as_ids([1, 2, 3, 4][:a]), as_ids([1, 2, 3, 4][a:b]), as_ids([1, 2, 3, 4][b:])) for a, b in cuts]
    pairs += [PairIds(as_ids([1]), as_ids([2, 3]), as_ids([4]), chosen_start=1)]
    assert len({pair_key(ids) for ids in pairs}) == len(pairs)
