"""A stream's rows are a function of their number."""

import numpy as np
import pytest

from moe_dist.data import stream
from moe_dist.data.sources import local_source
from moe_dist.data.stream import StreamRows
from moe_dist.errors import UserError
from tests.data.conftest import numbered
from tests.data.test_cache import NumberEncoder, documents_of


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(stream, "BUFFER_ROWS", 8)


def rows_of(write_jsonl, count=400, packing=True, seed=0):
    source = local_source(write_jsonl("a.jsonl", numbered(count)))
    return StreamRows(source, NumberEncoder(), seq_len=64, packing=packing, seed=seed)


def same(a, b):
    return all((a[key] == b[key]).all() for key in a)


def test_rows_are_the_same_however_they_are_reached(write_jsonl):
    whole = [rows_of(write_jsonl)[k] for k in range(3)]
    straight = rows_of(write_jsonl)
    ordered = [straight[k] for k in range(60)]
    assert all(same(a, b) for a, b in zip(whole, ordered, strict=False))
    jumping = rows_of(write_jsonl)
    for k in (5, 5, 40, 41, 7):  # forward, again, far forward, back
        assert same(jumping[k], ordered[k])


@pytest.mark.parametrize("packing", [True, False])
def test_one_pass_holds_every_document_once_and_then_starts_again(packing, write_jsonl):
    rows = rows_of(write_jsonl, packing=packing)
    found, texts = [], sorted(numbered(400))
    number = 0
    while len(found) < len(texts):
        found += documents_of([rows[number]])
        number += 1
    assert sorted(found) == texts
    again = [doc for k in range(number, 2 * number) for doc in documents_of([rows[k]])]
    assert sorted(again) == texts
    assert again != found


def test_seed_changes_the_order_within_buffers(write_jsonl):
    a, b = rows_of(write_jsonl, seed=0), rows_of(write_jsonl, seed=1)
    assert not all(same(a[k], b[k]) for k in range(8))


def test_empty_stream_is_an_error(write_jsonl):
    with pytest.raises(UserError, match="no document with a token to learn"):
        StreamRows(local_source(write_jsonl("a.jsonl", ["x"])), NumberEncoder(), seq_len=64, packing=True)[np.int64(0)]
