"""`packing: esft`: greedy rows, tails of what does not fit, and the bos that is lost by draw; all by hand."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from moe_dist.data.cache import cached_rows
from moe_dist.data.concat import concatenate
from moe_dist.data.loader import build_data
from moe_dist.data.packing import IGNORE
from moe_dist.data.sources import local_source
from moe_dist.data.stream import StreamRows
from tests.data.conftest import numbered
from tests.data.test_cache import NumberEncoder


def seed_whose_draws(*dropped: bool) -> int:
    """A seed under which Python's first draws fall below 0.2 just where `dropped` says so."""
    for seed in range(10_000):
        draws = random.Random(seed)
        if all((draws.random() < 0.2) == wanted for wanted in dropped):
            return seed
    raise AssertionError


def sample(*ids: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample whose bos and last token are learned."""
    loss = np.zeros(len(ids), bool)
    loss[[0, -1]] = True
    return np.asarray(ids, np.int32), loss


def rows(samples, seq_len, seed) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), loss.astype(int).tolist()) for ids, loss in concatenate(samples, seq_len, seed=seed)]


def test_rows_by_hand():
    samples = [sample(1, 11, 12), sample(1, 21, 22), sample(1, 31, 32, 33), sample(1, 41)]
    # Room for 2 of the third sample: its tail. The fourth begins a row, which draws nothing.
    assert rows(samples, 8, seed_whose_draws(False, False)) == [
        ([1, 11, 12, 1, 21, 22, 32, 33], [1, 0, 1, 1, 0, 1, 0, 1]),
        ([1, 41], [1, 1]),
    ]
    # The second loses its bos; the third then has room for 3, and loses the first of those.
    assert rows(samples, 8, seed_whose_draws(True, True)) == [
        ([1, 11, 12, 21, 22, 32, 33, 41], [1, 0, 1, 0, 1, 0, 1, 1])
    ]
    # A sample alone longer than a row keeps its tail; no row of padding follows a full one.
    assert rows([sample(*range(1, 12))], 4, 0) == [([8, 9, 10, 11], [0, 0, 0, 1])]
    assert rows([], 4, 0) == []


def plain(samples, seq_len: int, seed: int) -> list[list[int]]:
    """The rule once more, token by token."""
    draws, done, row = random.Random(seed), [], []
    for ids, _ in samples:
        keep = list(ids)
        while len(keep) > seq_len - len(row):
            keep.pop(0)
        if row and draws.random() < 0.2:
            keep.pop(0)
        row = row + keep
        if len(row) == seq_len:
            done.append(row)
            row = []
    return done + [row] * bool(row)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_many_samples(seed):
    generator = np.random.default_rng(seed)
    samples = [sample(1, *generator.integers(2, 99, generator.integers(1, 40))) for _ in range(300)]
    found = rows(samples, 64, seed)
    assert [ids for ids, _ in found] == plain(samples, 64, seed)
    assert all(len(ids) == 64 for ids, _ in found[:-1])
    assert any(1 in ids[1:] for ids, _ in found)
    assert all(loss[place] for ids, loss in found for place, token in enumerate(ids) if token == 1)


def test_a_row_is_one_sequence_and_its_labels_are_shifted_by_nobody(write_jsonl, tmp_path):
    source = local_source(write_jsonl("a.jsonl", ["abcd", "efghij", "klmnop"]))
    seed = seed_whose_draws(False, False)
    packed = cached_rows(tmp_path / "cache", source, NumberEncoder(), seq_len=12, packing="esft", seed=seed)
    (row,) = (packed[index] for index in range(len(packed)))
    assert bytes(row["input_ids"].astype(np.uint8)) == b"abcdefghijop"
    assert row["position_ids"].tolist() == list(range(12))
    assert row["labels"].tolist() == [IGNORE, *row["input_ids"][1:]]
    meta = packed.meta
    assert (meta["documents"], meta["tokens"], meta["unused_tokens"], meta["rows"]) == (3, 16, 4, 1)


def test_the_last_row_is_padded(write_jsonl, tmp_path):
    source = local_source(write_jsonl("a.jsonl", ["abcd", "efg"]))
    packed = cached_rows(
        tmp_path / "cache", source, NumberEncoder(), seq_len=9, packing="esft", seed=seed_whose_draws(True)
    )
    row = packed[0]
    assert bytes(row["input_ids"].astype(np.uint8)) == b"abcdfg\0\0\0"
    assert row["labels"].tolist() == [IGNORE, *row["input_ids"][1:6], *[IGNORE] * 3]
    assert row["attention_mask"].tolist() == [1] * 6 + [0] * 3
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]  # nothing attends to padding


def test_the_seed_decides_and_nothing_else(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", numbered(200))

    def packed(seed, packing="esft"):
        return cached_rows(
            tmp_path / "cache", local_source(path), NumberEncoder(), seq_len=64, packing=packing, seed=seed
        )

    assert packed(1).folder == packed(1).folder != packed(2).folder
    assert packed(1, True).folder == packed(2, True).folder  # other packings draw nothing
    first, second = packed(1), packed(2)
    assert any((first[k]["input_ids"] != second[k]["input_ids"]).any() for k in range(min(len(first), len(second))))
    # A stream gives the same rows, in an order of its own.
    streamed = StreamRows(local_source(path), NumberEncoder(), seq_len=64, packing="esft", seed=1)
    ours = sorted(tuple(streamed[k]["input_ids"]) for k in range(len(first)))
    assert ours == sorted(tuple(first[k]["input_ids"]) for k in range(len(first)))


def section(tmp_path, **changes):
    values = {
        "train": [], "eval": [], "eval_fraction": 0.0, "seq_len": 48, "packing": "esft",
        "cache_dir": str(tmp_path / "cache"), "chat_template": None, "on_bad_record": "fail",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_one_to_one_mixing_on_any_number_of_ranks(tokenizer, write_jsonl, tmp_path):
    """Alignment data beside the task's: half of every batch is either's, whatever their sizes and the ranks."""
    options = {
        "hub": None, "corpus": None, "subset": None, "revision": None, "split": "train", "format": "auto",
        "field": None, "weight": 1.0, "streaming": False, "limit": None,
    }  # fmt: skip
    sources = [
        SimpleNamespace(name=name, path=str(write_jsonl(f"{name}.jsonl", texts)), **options)
        for name, texts in (("task", numbered(40)), ("alignment", [text.upper() for text in numbered(300)]))
    ]
    data = build_data(section(tmp_path, train=sources), tokenizer, seed=7).train
    assert data.names == ["task", "alignment"]
    assert data.sampler.rows[1] > 4 * data.sampler.rows[0]
    for _ in range(6):
        before, drawn = data.state_dict(), data.sampler.batch_at(data.sampler.position, 32)
        assert [source for source, _ in drawn].count(0) == 16
        by_ranks = []
        for ranks in (1, 2, 4):
            rows = []
            for rank in range(ranks):
                data.load_state_dict(before)
                rows += [
                    tuple(ids)
                    for part in data.next_batch(32, rank=rank, ranks=ranks)
                    for ids in part["input_ids"].tolist()
                ]
            by_ranks.append(sorted(rows))
        assert len(by_ranks[0]) == 32
        assert by_ranks[0] == by_ranks[1] == by_ranks[2]
