"""Choice of field, splits by document, fingerprints, hub datasets."""

import json
import os
import shutil

import pytest

from moe_dist.data.records import RecordLog, describe_log
from moe_dist.data.sources import hub_source, local_source
from moe_dist.errors import UserError
from tests.data.conftest import numbered


def texts(source):
    return [record.text for record in source.records(RecordLog())]


def test_auto_format_takes_messages_or_text_and_named_fields(tmp_path):
    answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"messages": answer, "body": "b"}) + "\n" + json.dumps({"text": "t", "body": "c"}) + "\n"
    )
    first, second = local_source(path).records(RecordLog())
    assert (first.messages, first.text, second.messages, second.text) == (answer, None, None, "t")
    assert texts(local_source(path, field_name="body")) == ["b", "c"]
    book = RecordLog(on_bad="skip")
    assert len(list(local_source(path, kind="chat").records(book))) == 1
    assert book.bad == {"missing_field": 1}


def test_limit_counts_usable_documents_and_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\nbroken\n{"text": "2"}\nbroken\n')
    book = RecordLog(on_bad="skip")
    assert [r.text for r in local_source(path, limit=2).records(book)] == ["1", "2"]
    assert book.bad == {"corrupt_json": 1}


def test_held_out_split_is_by_content(write_jsonl):
    documents = numbered(400) + numbered(400)
    train, held_out = local_source(write_jsonl("a.jsonl", documents)).split_held_out(0.1)
    assert sorted(texts(train) + texts(held_out)) == sorted(documents)
    assert not set(texts(train)) & set(texts(held_out))
    assert 0.05 * 800 < len(texts(held_out)) < 0.15 * 800
    assert train.fingerprint() != held_out.fingerprint()


def test_fingerprint_follows_content_not_place_or_time(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", numbered(5))
    before = local_source(path).fingerprint(tmp_path / "memo")
    os.utime(path, (1, 1))
    assert local_source(path).fingerprint(tmp_path / "memo") == before
    (tmp_path / "elsewhere").mkdir()
    assert local_source(shutil.copy(path, tmp_path / "elsewhere")).fingerprint() == before
    assert local_source(path, limit=3).fingerprint() != before
    write_jsonl("a.jsonl", numbered(6))
    assert local_source(path).fingerprint(tmp_path / "memo") != before


def test_digest_of_a_file_is_remembered(write_jsonl, tmp_path, monkeypatch):
    path = write_jsonl("a.jsonl", numbered(5))
    before = local_source(path).fingerprint(tmp_path / "memo")
    monkeypatch.setattr("moe_dist.data.fingerprint._hash_blocks", lambda file: pytest.fail("hashed again"))
    assert local_source(path).fingerprint(tmp_path / "memo") == before


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(streaming, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write_jsonl("set/train.jsonl", ["one", "two"])
    write_jsonl("set/test.jsonl", ["three"])
    options = {"streaming": streaming}
    records = list(hub_source(str(tmp_path / "set"), split="train", **options).records(RecordLog()))
    assert [r.text for r in records] == ["one", "two"]
    assert records[1].origin.endswith("set:train:row 1")
    test = hub_source(str(tmp_path / "set"), split="test", **options)
    assert texts(test) == ["three"]
    assert len(test.fingerprint()) == 64
    with pytest.raises(UserError, match="cannot load"):
        texts(hub_source(str(tmp_path / "set"), split="nosuch", **options))


def test_split_of_local_data_is_refused(write_jsonl):
    with pytest.raises(UserError, match="'split' chooses within a hub dataset"):
        local_source(write_jsonl("a.jsonl", ["x"]), split="test")


def test_streaming_of_jsonl_is_refused(write_jsonl):
    with pytest.raises(UserError, match="streaming needs a hub or a Parquet source"):
        local_source(write_jsonl("a.jsonl", ["x"]), streaming=True)


def test_log_lines_name_kind_count_and_place():
    book = RecordLog(on_bad="skip")
    book.reject("empty", "f:3", "why")
    book.reject("empty", "f:9", "why")
    book.note("crlf", "f:1")
    assert describe_log(book.as_dict(), "mine") == [
        "mine: 2 x empty left out (first: f:3, f:9)",
        "mine: 1 x crlf tidied up (first: f:1)",
    ]
    with pytest.raises(UserError, match="'fail' or 'skip'"):
        RecordLog(on_bad="ignore")
