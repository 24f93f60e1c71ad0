"""Reading pair files: every format gives the same pairs, and every fault of a row costs that row only."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.data import pairs, readers
from dpoeng.engine.data.pairs import ensure_unchanged, read_pairs
from dpoeng.engine.data.rejects import write_rejects

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"Instruction: say {i}\nResponse:",
        "chosen": f" {i}, gladly\nEND",
        "rejected": f" no \u2028 {i} é\nEND",
        "margin": i / 2,
        "confident": i % 2 == 0,
        "negative_type": "evasive",
    }
    for i in range(7)
]


def line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def good_lines(count: int = 40) -> list[bytes]:
    return [line({"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}) for i in range(count)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def pq_bytes(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS)[:rows], sink)
    return bytes(sink.getvalue())


def ipc_bytes(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)[:rows]
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def write_jsonl(path: Path) -> None:
    path.write_bytes(b"".join(map(line, ROWS)))


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path, opener: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "lines.json": write_jsonl,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"".join(map(line, ROWS)))),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(b"".join(map(line, ROWS)))),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + b"".join(map(line, ROWS))),
    "crlf.jsonl": lambda path: path.write_bytes(b"".join(map(line, ROWS)).replace(b"\n", b"\r\n")),
    "no-newline.jsonl": lambda path: path.write_bytes(b"".join(map(line, ROWS)).rstrip(b"\n")),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8"),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3),
    "file.arrow": lambda path: write_arrow(path, ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, ipc.new_stream),
    "a.feather": lambda path: write_arrow(path, ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = read_pairs([path])
    assert found.rejects == []
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found.pairs] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in ROWS
    ]
    assert [pair.extra for pair in found.pairs] == [
        {name: row[name] for name in ("margin", "confident", "negative_type")} for row in ROWS
    ]
    assert [(pair.source_file, pair.source_row) for pair in found.pairs] == [(str(path), i) for i in range(1, 8)]
    assert list(found.files) == [str(path)]


# One faulty line each (fault number of the project's list, where it has one), and what the rejects file calls it.
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "2 bad utf-8": (b'{"prompt": "p", "chosen": "\xff", "rejected": "b"}\n', "bad-utf8"),
    "6 NaN": (b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}\n', "not-finite"),
    "6 -Infinity": (b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -Infinity}\n', "not-finite"),
    "6 1e999": (b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1e999}\n', "not-finite"),
    "7 duplicate key": (b'{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}\n', "duplicate-key"),
    "7 duplicate key inside": (
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "x": [{"k": 1, "k": 1}]}\n',
        "duplicate-key",
    ),
    "8 lone surrogate": (b'{"prompt": "p", "chosen": "\\ud83d!", "rejected": "b"}\n', "lone-surrogate"),
    "8 lone surrogate in a key": (b'{"prompt": "p", "chosen": "a", "rejected": "b", "\\udc00": 1}\n', "lone-surrogate"),
    "9 deep arrays": (b"[" * 100_000 + b"\n", "json-too-deep"),
    "9 deep objects": (b'{"prompt":' * 100_000 + b"\n", "json-too-deep"),
    "9 deep in a column": (
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + b"[" * 80 + b"]" * 80 + b"}\n",
        "json-too-deep",
    ),
    "10 an array": (b'["p", "a", "b"]\n', "not-an-object"),
    "10 a number": (b"17\n", "not-an-object"),
    "10 null": (b"null\n", "not-an-object"),
    "11 missing": (b'{"prompt": "p", "chosen": "a"}\n', "missing-field"),
    "11 null": (b'{"prompt": "p", "chosen": "a", "rejected": null}\n', "missing-field"),
    "11 a number": (b'{"prompt": "p", "chosen": "a", "rejected": 3}\n', "wrong-type"),
    "11 a prompt of the wrong type": (b'{"prompt": {"a": 1}, "chosen": "a", "rejected": "b"}\n', "wrong-type"),
    "12 empty": (b'{"prompt": "p", "chosen": "", "rejected": "b"}\n', "empty-response"),
    "12 white space": (b'{"prompt": "p", "chosen": "a", "rejected": " \\n\\t"}\n', "empty-response"),
    "13 equal": (b'{"prompt": "p", "chosen": "a", "rejected": "a"}\n', "same-response"),
    "no JSON": (b"prompt: p\n", "bad-json"),
    "two objects": (b'{"prompt": "p", "chosen": "a", "rejected": "b"} {}\n', "bad-json"),
    "single quotes": (b"{'prompt': 'p'}\n", "bad-json"),
    "raw control character": (b'{"prompt": "p", "chosen": "a\x01", "rejected": "b"}\n', "bad-json"),
    "an endless integer": (b'{"prompt": "p", "chosen": "a", "rejected": "b", "n": ' + b"9" * 9999 + b"}\n", "bad-json"),
    "no common beginning": (b'{"chosen": "a", "rejected": "b"}\n', "no-common-prompt"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_is_left_out_and_named(tmp_path: Path, fault: str) -> None:
    bad, reason = BAD_LINES[fault]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join([*good_lines(20), bad, *good_lines(40)[20:]]))
    found = read_pairs([path])
    assert [(reject.source_file, reject.source_row, reject.reason) for reject in found.rejects] == [
        (str(path), 21, reason)
    ]
    assert found.rejects[0].detail
    assert [pair.chosen for pair in found.pairs] == [f"good {i}" for i in range(40)]
    assert [pair.source_row for pair in found.pairs] == [*range(1, 21), *range(22, 42)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_where_a_line_is_wrong_is_a_column_of_it(tmp_path: Path, end: str) -> None:
    """A line has no second line, also where it ends too early."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(f'{{"prompt": "p",{end}{{"prompt" "p"}}{end}'.encode() + b"".join(good_lines()))
    first, second = (reject.detail for reject in read_pairs([path]).rejects)
    assert first.endswith("(column 16)")
    assert second.endswith("(column 11)")


def test_fault_1_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join(good_lines())[:-9])
    found = read_pairs([path])
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [(40, "cut-line")]
    assert len(found.pairs) == 39


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
def test_fault_5_line_separators_inside_texts(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"a{separator}b", "chosen": f"{separator}c", "rejected": f"d{separator}"}]
    path.write_bytes(json.dumps(rows[0], ensure_ascii=separator < " ").encode() + b"\n")
    pair = read_pairs([path]).pairs[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == tuple(rows[0].values())


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n \r\n" + good_lines()[0] + b"\n\n")
    found = read_pairs([path])
    assert found.rejects == []
    assert [pair.source_row for pair in found.pairs] == [3]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv"])
def test_fault_18_a_huge_line_costs_that_line_and_no_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        text = b"prompt,chosen,rejected\n" + b"p,a,b\n" * 30 + b'p,"' + b"x" * (200 << 20) + b'",b\n' + b"p,a,b\n" * 30
    else:
        text = b"".join([*good_lines(30), b'{"prompt": "' + b"x" * (200 << 20) + b'"}\n', *good_lines(30)])
    path.write_bytes({"gz": gzip.compress, "zst": zstd}.get(suffix.split(".")[-1], bytes)(text))
    del text
    script = (
        "import sys, resource; from pathlib import Path; from dpoeng.engine.data.pairs import read_pairs\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = read_pairs([Path(sys.argv[1])])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(found.pairs), [(r.source_row, r.reason) for r in found.rejects], (after - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    pairs, rejects, grown_mib = done.stdout.replace("[", "|").replace("]", "|").split("|")
    assert (pairs.strip(), rejects) == ("60", "(31, 'line-too-long')")
    assert int(grown_mib) < 100  # the line is 200 MiB; the longest one allowed is 16


def test_fault_19_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join([*good_lines(18), b"{}\n", b'{"prompt": "p", "chosen": "a", "rejected": "a"}\n']))
    with pytest.raises(UserError) as caught:
        read_pairs([path])
    assert (caught.value.code, caught.value.exit_status) == ("data-rejects", 3)
    assert "2 of 20 rows" in str(caught.value)
    assert f"{path}:19: `chosen` is missing" in str(caught.value)
    assert f"{path}:20: chosen and rejected are equal" in str(caught.value)
    assert len(read_pairs([path], max_reject_share=0.1).pairs) == 18


def test_fault_19_a_large_unusable_file_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join([*good_lines(), b"{}\n" * 1000]))
    monkeypatch.setattr(pairs, "GIVE_UP_EVERY", 100)
    with pytest.raises(UserError, match="100 of 140 rows cannot be used"):
        read_pairs([path])
    assert len(read_pairs([path], max_reject_share=1.0).rejects) == 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json", b""),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"prompt,chosen,rejected\n"),
        ("a.parquet", pq_bytes(0)),
        ("a.arrow", ipc_bytes(0)),
    ],
)
def test_fault_20_an_empty_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pairs([tmp_path / name])
    assert (caught.value.code, caught.value.where) == ("data-empty", str(tmp_path / name))


def test_fault_21_a_file_edited_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join(good_lines()))

    def edit_meanwhile(file: Path) -> Any:
        yield from original(file)
        content = file.read_bytes()
        stat = file.stat()
        file.write_bytes(content.replace(b"good 3", b"GOOD 3"))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    original = readers.read_rows
    monkeypatch.setattr(readers, "read_rows", edit_meanwhile)
    with pytest.raises(UserError, match="changed during the run"):
        read_pairs([path])


def test_fault_21_a_file_edited_later_in_the_run(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join(good_lines()))
    files = read_pairs([path]).files
    ensure_unchanged(files)
    path.write_bytes(b"".join(good_lines()).replace(b"good 3", b"GOOD 3"))
    with pytest.raises(UserError) as caught:
        ensure_unchanged(files)
    assert caught.value.code == "data-changed"
    path.unlink()
    with pytest.raises(UserError, match="data-changed"):
        ensure_unchanged(files)


def test_bad_rows_of_a_json_array_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    good = [json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) for i in range(60)]
    path.write_text("[" + ",".join([*good, '{"a": 1, "a": 2}', '{"prompt": NaN}', "7"]) + "]")
    found = read_pairs([path])
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [
        (61, "duplicate-key"),
        (62, "not-finite"),
        (63, "not-an-object"),
    ]
    assert len(found.pairs) == 60


def test_csv_rows_with_faults(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = [b"p%d,a,b,\n" % i for i in range(60)]
    path.write_bytes(
        b"prompt,chosen,rejected,note\n"
        + b"".join(rows)
        + b"p,a\n"  # 61: too few cells
        + b"p,a,b,c,d\n"  # 62: too many
        + b'p,"a \xff",b,\n'  # 63: not UTF-8
        + b'"multi\nline","a ""quoted""",b,\n'  # 64: good
    )
    found = read_pairs([path])
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [
        (61, "bad-csv"),
        (62, "bad-csv"),
        (63, "bad-utf8"),
    ]
    assert (found.pairs[-1].prompt, found.pairs[-1].chosen) == ("multi\nline", 'a "quoted"')
    assert found.pairs[-1].source_row == 64


def test_csv_cells_have_the_types_that_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,a,b,c,d,e,f\n1,2,3,4,0.5,True,,1_000,x\n")
    pair = read_pairs([path]).pairs[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ("1", "2", "3")
    assert pair.extra == {"a": 4, "b": 0.5, "c": True, "d": None, "e": "1_000", "f": "x"}


def test_csv_with_semicolons_and_messages_as_json(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    messages = '[{"role": "user", "content": "hi"}]'.replace('"', '""')
    path.write_text(f'prompt;chosen;rejected\n"{messages}";yes;no\n')
    pair = read_pairs([path]).pairs[0]
    assert pair.prompt == [{"role": "user", "content": "hi"}]
    assert pair.chosen == [{"role": "assistant", "content": "yes"}]


def test_parquet_values_that_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    columns: dict[str, Any] = {
        "prompt": ["p"],
        "chosen": ["a"],
        "rejected": ["b"],
        "nan": pa.array([float("nan")]),
        "day": pa.array([0], pa.date32()),
        "bytes": pa.array([b"\xff"]),
    }
    pq.write_table(pa.table(columns), path)
    assert read_pairs([path]).pairs[0].extra == {"nan": None, "day": "1970-01-01", "bytes": "/w=="}


def test_parquet_with_invalid_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    chosen = pa.array([b"a"] * 50 + [b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["p"] * 51, "chosen": chosen, "rejected": ["b"] * 51}), path)
    found = read_pairs([path])
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [(51, "bad-utf8")]


def test_parquet_messages_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    plain = [{"role": "user", "content": "hi"}]
    named = [{"role": "user", "content": "hi", "name": "Ann"}]
    pq.write_table(pa.table({"prompt": [plain, named], "chosen": ["a", "a"], "rejected": ["b", "b"]}), path)
    assert [pair.prompt for pair in read_pairs([path]).pairs] == [plain, named]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[{".arrow": "file.arrow"}.get(suffix, f"a{suffix}")](path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError) as caught:
        read_pairs([path])
    assert caught.value.code in ("data-damaged", "data-empty")
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.jsonl", b"\xff\xfe{\0}\0", "data-encoding"),
        ("a.json", b'[{"prompt": ', "data-bad-json"),
        ("a.json", b"3", "data-bad-json"),
        ("a.json", b'"\xff"', "data-bad-json"),
        ("a.json", b'{"data": [], "data": []}', "data-bad-json"),
        ("a.json", b'{\n"data": {}}', "data-bad-json"),
        ("a.parquet", b"no parquet", "data-damaged"),
        ("a.parquet", b"", "data-damaged"),
        ("a.arrow", b"", "data-damaged"),
        ("a.arrow", b"no arrow", "data-damaged"),
        ("a.jsonl.gz", b"no gzip", "data-damaged"),
        ("a.jsonl.zst", b"no zstd", "data-damaged"),
        ("a.parquet.gz", b"", "data-unknown-kind"),
        ("a.txt", b"", "data-unknown-kind"),
        ("pairs", b"", "data-unknown-kind"),
        ("a.csv", b"prompt,chosen,chosen\np,a,b\n", "data-columns"),
        ("a.csv", b"prompt,ch\xffosen,rejected\np,a,b\n", "data-bad-csv"),
        ("a.csv", b'prompt,"chosen,rejected\np,a,b\n', "data-bad-csv"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_named(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pairs([tmp_path / name])
    assert (caught.value.code, caught.value.where, caught.value.exit_status) == (code, str(tmp_path / name), 3)
    assert caught.value.expected or caught.value.found


def test_a_json_document_too_large_to_be_read_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(UserError, match="JSON Lines") as caught:
        read_pairs([path])
    assert caught.value.code == "data-too-large"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_of_too_many_values_costs_that_line(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_VALUES", 1000)
    path = tmp_path / f"pairs{suffix}"
    bomb = b'{"prompt": "p", "chosen": "a", "rejected": "b", "x": [' + b"[]," * 600 + b"[]]}\n"
    text = b"".join([*good_lines(2), bomb, *good_lines(2)])
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    found = read_pairs([path], max_reject_share=0.5)
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [(3, "line-too-long")]


def test_a_json_document_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"[" + b"[]," * 200 + b"[]]"))
    monkeypatch.setattr(readers, "MAX_DOCUMENT_VALUES", 300)
    with pytest.raises(UserError, match="has more than 0 million values"):
        read_pairs([path])


def test_columns_of_csv_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpoeng.engine.data.tables.MAX_COLUMNS", 4)
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,a,b\n1,2,3,4,5\n")
    with pytest.raises(UserError, match="more than 4 columns"):
        read_pairs([path])


def test_missing_file_directory_without_data_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data-missing"):
        read_pairs([tmp_path / "absent.jsonl"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README.md").write_text("")
    with pytest.raises(UserError, match=r"README\.md") as caught:
        read_pairs([tmp_path / "sub"])
    assert caught.value.code == "data-no-files"
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="data-not-a-file"):
        read_pairs([tmp_path / "pipe.jsonl"])


def test_a_directory_stands_for_its_files_by_name_and_each_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(good_lines()[0])
    (tmp_path / "a.jsonl").write_bytes(good_lines()[1])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    found = read_pairs([tmp_path / "b.jsonl", tmp_path, tmp_path / "a.jsonl"])
    assert [pair.chosen for pair in found.pairs] == ["good 0", "good 1"]
    assert list(found.files) == [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]


def test_columns_are_mapped_and_missing_ones_explained(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(line({"prompt": "p", "response_a": "a", "response_b": "b", "n": 1}))
    found = read_pairs([path], columns={"chosen": "response_a", "rejected": "response_b"})
    assert (found.pairs[0].chosen, found.pairs[0].rejected, found.pairs[0].extra) == ("a", "b", {"n": 1})

    with pytest.raises(UserError) as caught:
        read_pairs([path])
    assert caught.value.code == "data-columns"
    assert caught.value.found == "prompt, response_a, response_b, n"
    assert "--columns chosen=NAME" in caught.value.text()

    with pytest.raises(UserError, match="did you mean 'response_a'"):
        read_pairs([path], columns={"chosen": "respons_a", "rejected": "response_b"})
    with pytest.raises(UserError, match="did you mean chosen=response_a"):
        read_pairs([path], columns={"chosn": "response_a"})


def test_a_duplicate_names_the_file_of_the_first_of_its_kind(tmp_path: Path) -> None:
    """In the second file of three, not the first."""
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, answers in zip(paths, ("xy", "vw", "w"), strict=True):
        rows = ({"prompt": "p", "chosen": answer, "rejected": "z"} for answer in answers)
        path.write_bytes(b"".join(map(line, rows)))
    (repeat,) = read_pairs(paths).duplicates
    assert (repeat.source_file, repeat.source_row) == (str(paths[2]), 1)
    assert (repeat.first_file, repeat.first_row) == (str(paths[1]), 2)


def test_duplicates_and_contradictions_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [("p", "a", "b"), ("p", "a", "c"), ("p", "a", "b"), ("p", "b", "a"), ("q", "b", "a")]
    path.write_bytes(b"".join(line(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows))
    found = read_pairs([path])
    assert len(found.pairs) == 5
    assert [(repeat.source_row, repeat.first_row) for repeat in found.duplicates] == [(3, 1)]
    assert [(repeat.source_row, repeat.first_row) for repeat in found.contradictions] == [(4, 1)]


def test_the_rejects_file_lists_every_row_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join([*good_lines(), b"{\n", b'{"prompt": "\\ud800"}\n']))
    found = read_pairs([path])
    write_rejects(tmp_path / "rejects.jsonl", found.rejects)
    rows = [json.loads(text) for text in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["source_file"], row["source_row"], row["reason"]) for row in rows] == [
        (str(path), 41, "bad-json"),
        (str(path), 42, "lone-surrogate"),
    ]


def test_an_unreadable_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(good_lines()[0])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        read_pairs([path])


def test_a_quote_that_is_never_closed_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which row a later line belongs to, nothing tells: not one row is made of what stands behind it."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2000)
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'prompt,chosen,rejected\np,a,b\np,"' + b"x,\n" * 1000 + b"p,c,d\n")
    with pytest.raises(UserError, match="not closed") as caught:
        read_pairs([path])
    assert (caught.value.code, caught.value.where) == ("data-bad-csv", f"{path}, row 2")


@pytest.mark.parametrize("content", ['{"splits": ["../outside"]}', '{"splits": ["."]}', "[" * 100_000])
def test_a_saved_data_set_names_no_folder_but_its_own(tmp_path: Path, content: str) -> None:
    for name in ("outside", "set"):
        (tmp_path / name).mkdir()
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "outside" / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "set" / "dataset_dict.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_pairs([tmp_path / "set"])
    assert caught.value.code == "data-damaged"
