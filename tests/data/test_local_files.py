"""Every kind of bad input is counted and located; benign oddities are tidied up."""

import gzip
import json

import pytest

from moe_dist.data.local_files import TEXT_PIECE_BYTES, list_files
from moe_dist.data.records import RecordLog
from moe_dist.data.sources import local_source
from moe_dist.errors import UserError

GOOD = b'{"text": "good"}\n'
BAD = {
    "corrupt_json": b'{"text": "cut off\n',
    "invalid_utf8": b'{"text": "caf\xe9"}\n',
    "empty": b'{"text": "  \\n "}\n',
    "missing_field": b'{"body": "elsewhere"}\n',
    "wrong_type": b'{"text": 3}\n',
    "too_large": json.dumps({"text": "x" * 10_000_000}).encode() + b"\n",
}


def read(path, on_bad="skip", **options):
    book = RecordLog(on_bad=on_bad)
    return list(local_source(path, **options).records(book)), book


@pytest.mark.parametrize("kind", BAD)
def test_bad_line_is_counted_and_located(kind, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + BAD[kind] + GOOD)
    records, book = read(path)
    assert [record.origin for record in records] == [f"{path}:1", f"{path}:3"]
    assert book.bad == {kind: 1}
    assert book.places[kind] == [f"{path}:2"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_line_stops_under_policy_fail(kind, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + BAD[kind] + GOOD)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*\({kind}\).*on_bad_record=skip"):
        read(path, on_bad="fail")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'["not", "an", "object"]\n', "wrong_type"),
        (b'{"text": "\\ud800 alone"}\n', "invalid_utf8"),
        (b"[" * 100_000 + b"\n", "corrupt_json"),
        (b'{"messages": "hello"}\n', "wrong_type"),
        (b'{"messages": [{"role": "user", "content": "no answer"}]}\n', "empty"),
        (b'{"messages": [{"role": "assistant", "content": null}]}\n', "wrong_type"),
    ],
)
def test_other_bad_lines(line, kind, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line + GOOD)
    records, book = read(path)
    assert len(records) == 1
    assert book.places == {kind: [f"{path}:1"]}


def test_line_over_the_limit_is_dropped_and_the_next_one_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "' + b"y" * 3_000_000 + b'"}\n' + GOOD)
    records, book = read(path, max_bytes=1000)
    assert [record.origin for record in records] == [f"{path}:2"]
    assert book.bad == {"too_large": 1}


def test_crlf_bom_blank_lines_and_duplicate_ids_are_noted_not_lost(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 7, "text": "one"}\r\n\r\n{"id": 7, "text": "two"}\r\n{"id": 8, "text": "x"}')
    records, book = read(path, on_bad="fail")
    assert [record.text for record in records] == ["one", "two", "x"]
    assert book.bad == {}
    assert book.noted == {"bom": 1, "crlf": 3, "blank_line": 1, "duplicate_id": 1}
    assert book.places["duplicate_id"] == [f"{path}:3"]


def test_json_array_and_gzip(tmp_path):
    array = tmp_path / "a.json"
    array.write_text('\n [{"text": "one"},\n {"nothing": 1}, {"text": "two"}]')
    records, book = read(array)
    assert [(r.text, r.origin) for r in records] == [("one", f"{array}[0]"), ("two", f"{array}[2]")]
    assert book.places == {"missing_field": [f"{array}[1]"]}
    array.write_text('[{"text": "one"},\n {"text" "two"}]')
    assert read(array)[1].places == {"corrupt_json": [f"{array}:2"]}

    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD * 1000))
    assert len(read(packed)[0]) == 1000
    packed.write_bytes(packed.read_bytes()[:-12])
    records, book = read(packed)
    assert book.bad == {"corrupt_file": 1}
    assert book.places["corrupt_file"] == [f"{packed}:{len(records) + 1}"]


def test_text_file_is_a_document_and_a_large_one_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n")
    assert [r.text for r in read(path)[0]] == ["one\ntwo"]
    lines = [f"line {i} " + "z" * 90 for i in range(25_000)]
    path.write_text("\n".join(lines))
    records, _ = read(path)
    assert len(records) == 3
    assert "\n".join(r.text for r in records) == "\n".join(lines)
    assert all(len(r.text) <= TEXT_PIECE_BYTES + 200 for r in records)
    second = int(records[1].origin.rsplit(":", 1)[1])
    assert records[1].text.startswith(lines[second - 1])
    path.write_bytes(b"")
    assert read(path)[1].places == {"empty": [f"{path}:1"]}
    path.write_bytes(b"fine\nbroken \xff\nfine again")
    records, book = read(path)
    assert book.places == {"invalid_utf8": [f"{path}:2"]}
    assert records[0].text == "fine\nfine again"


def test_parquet_rows_and_a_damaged_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "three"]}), path)
    records, book = read(path)
    assert [(r.text, r.origin) for r in records] == [("one", f"{path}:row 0"), ("three", f"{path}:row 2")]
    assert book.places == {"missing_field": [f"{path}:row 1"]}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        read(path)


def test_folder_gives_its_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "a/2.jsonl", "a/1.txt", ".hidden/x.jsonl", "notes.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    names = [file.relative_to(tmp_path).as_posix() for file in list_files(tmp_path)]
    assert names == ["a/1.txt", "a/2.jsonl", "b.jsonl"]


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        local_source(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="no data files"):
        local_source(tmp_path)
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown kind of file"):
        local_source(tmp_path / "a.docx")
