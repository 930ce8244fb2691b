"""A cache entry exists whole or not at all, whatever is built at once or killed."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from moe_dist.data.cache import PackedRows, cached_rows
from moe_dist.data.encode import Encoder
from moe_dist.data.packing import IGNORE
from moe_dist.data.sources import local_source
from moe_dist.errors import UserError
from tests.data.conftest import numbered

SPAWN = multiprocessing.get_context("spawn")


class NumberEncoder:
    """Stands for a tokenizer in spawned processes: one token a character. After `dies_at` documents it is killed."""

    identity = {"characters": 1}  # noqa: RUF012
    pad_id = 0

    def __init__(self, dies_at=None, mark=None):
        self.dies_at, self.mark = dies_at, mark

    def encode(self, records, book):
        for number, record in enumerate(records):
            if number == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mark and number == 0:
                with open(self.mark, "a") as file:
                    file.write("built\n")
            ids = np.frombuffer(record.text.encode(), np.uint8).astype(np.int32)
            yield ids, np.ones(len(ids), bool)


def build(root, path, dies_at=None, mark=None):
    return cached_rows(root, local_source(path), NumberEncoder(dies_at, mark), seq_len=64, packing=True)


def documents_of(rows) -> list[str]:
    """The documents of NumberEncoder rows, read back through ids and position ids."""
    found = []
    for row in rows:
        for start in np.flatnonzero((row["position_ids"] == 0) & (row["attention_mask"] == 1)):
            ids, positions = row["input_ids"][start:], row["position_ids"][start:]
            real = (row["attention_mask"][start:] == 1) & (positions == np.arange(len(ids)))
            found.append(bytes(ids[: np.argmin(real) if not real.all() else len(ids)].astype(np.uint8)).decode())
    return sorted(found)


def test_every_document_is_in_the_rows_once(tokenizer, write_jsonl, tmp_path):
    texts = numbered(200)
    path = write_jsonl("a.jsonl", texts)
    rows = build(tmp_path / "cache", path)
    assert documents_of(rows) == sorted(texts)
    assert rows.meta["documents"] == 200
    assert rows.meta["tokens"] == sum(map(len, texts))
    assert (
        rows.meta["label_tokens"] == sum((row["labels"] != IGNORE).sum() for row in rows) == sum(map(len, texts)) - 200
    )
    assert rows.meta["fill"] > 0.9

    encoder = Encoder(tokenizer)
    single = cached_rows(tmp_path / "cache", local_source(path), encoder, seq_len=64, packing=False)
    assert len(single) == 200
    assert [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in single] == texts
    assert all((row["position_ids"] == 0).sum() <= 2 for row in single)


def test_long_document_fills_several_rows(write_jsonl, tmp_path):
    text = "".join(str(i % 10) for i in range(150))
    rows = build(tmp_path / "cache", write_jsonl("a.jsonl", [text]))
    assert documents_of(rows) == sorted([text[:64], text[64:128], text[128:]])


def test_second_call_reads_the_cache_alone(write_jsonl, tmp_path):
    path, mark = write_jsonl("a.jsonl", numbered(20)), tmp_path / "mark"
    first, second = (build(tmp_path / "cache", path, mark=mark) for _ in range(2))
    assert mark.read_text() == "built\n"
    assert all((first[0][key] == second[0][key]).all() for key in first[0])
    write_jsonl("a.jsonl", numbered(21))
    assert build(tmp_path / "cache", path, mark=mark).folder != first.folder
    assert mark.read_text() == "built\n" * 2


def test_key_follows_everything_that_decides_the_rows(tokenizer, write_jsonl, tmp_path):
    source = local_source(write_jsonl("a.jsonl", numbered(20)))
    plain, other_chat = Encoder(tokenizer), Encoder(tokenizer, chat_template="{{ messages }}")
    arguments = [(plain, 32, True), (plain, 33, True), (plain, 32, False), (other_chat, 32, True)]
    folders = {
        cached_rows(tmp_path, source, encoder, seq_len=seq_len, packing=packing).folder
        for encoder, seq_len, packing in arguments
    }
    assert len(folders) == len(arguments)


def test_processes_that_build_at_once_give_one_whole_entry(write_jsonl, tmp_path):
    path, mark = write_jsonl("a.jsonl", numbered(3000)), tmp_path / "mark"
    processes = [SPAWN.Process(target=build, args=(tmp_path / "cache", path, None, mark)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert mark.read_text() == "built\n"
    assert documents_of(build(tmp_path / "cache", path)) == sorted(numbered(3000))


def test_without_locks_the_first_rename_wins(write_jsonl, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = write_jsonl("a.jsonl", numbered(20))
    root = tmp_path / "cache"

    class Late(NumberEncoder):
        def encode(self, records, book):
            build(root, path)  # somebody else is done first
            yield from super().encode(records, book)

    rows = cached_rows(root, local_source(path), Late(), seq_len=64, packing=True)
    assert documents_of(rows) == sorted(numbered(20))
    assert list(root.glob(".building-*")) == []


def test_killed_while_writing_leaves_nothing_that_looks_whole(write_jsonl, tmp_path):
    path, root = write_jsonl("a.jsonl", numbered(500)), tmp_path / "cache"
    process = SPAWN.Process(target=build, args=(root, path, 300))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(root.glob(".building-*"))) == 1
    assert list(root.glob("*/meta.json")) == []
    assert documents_of(build(root, path)) == sorted(numbered(500))
    assert list(root.glob(".building-*")) == []


@pytest.mark.parametrize("name", ["tokens.bin", "rows.bin"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_entry_is_named(name, damage, write_jsonl, tmp_path):
    rows = build(tmp_path, write_jsonl("a.jsonl", numbered(20)))
    file = rows.folder / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"the token cache is damaged .*delete that folder"):
        PackedRows(rows.folder)


def test_folder_without_meta_is_replaced(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", numbered(20))
    rows = build(tmp_path / "cache", path)
    (rows.folder / "meta.json").unlink()
    assert documents_of(build(tmp_path / "cache", path)) == sorted(numbered(20))


def test_full_disk_is_a_clear_error_and_leaves_nothing(write_jsonl, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_dist.data.cache.write_durably", full)
    with pytest.raises(UserError, match=r"no space left for the token cache of 'a' .*data\.cache_dir"):
        build(tmp_path / "cache", write_jsonl("a.jsonl", numbered(20)))
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "files"] == []


def test_bad_records_are_kept_in_the_entry_and_stop_a_strict_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbroken\n{"text": "three"}\n')
    options = {"seq_len": 64, "packing": True}
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl:2"):
            cached_rows(tmp_path / "cache", local_source(path), NumberEncoder(), **options)
        rows = cached_rows(tmp_path / "cache", local_source(path), NumberEncoder(), on_bad="skip", **options)
        assert rows.meta["book"]["bad"] == {"corrupt_json": 1}
    assert documents_of(rows) == ["one", "three"]
    assert json.loads((rows.folder / "meta.json").read_text())["book"]["places"] == {"corrupt_json": [f"{path}:2"]}


def test_source_without_anything_to_learn(write_jsonl, tmp_path):
    with pytest.raises(UserError, match="a: no document with a token to learn"):
        build(tmp_path, write_jsonl("a.jsonl", ["x"]))
