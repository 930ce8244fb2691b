"""From a config's data section to batches: the same rows at any layout, resumable, evaluation with equal counts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_dist.data.loader import build_data, check_data
from moe_dist.data.packing import IGNORE
from moe_dist.errors import UserError
from tests.data.conftest import numbered

SOURCE = {
    "path": None, "hub": None, "corpus": None, "name": None, "subset": None, "revision": None, "split": "train",
    "format": "auto", "field": None, "weight": 1.0, "streaming": False, "limit": None,
}  # fmt: skip


def source(**fields):
    return SimpleNamespace(**{**SOURCE, **fields})


@pytest.fixture
def section(tmp_path, write_jsonl):
    """`section(**changes)`: a data section with two training sources and two held-out domains."""
    write_jsonl("a.jsonl", numbered(60))
    write_jsonl("b.jsonl", [text.upper() for text in numbered(30)])
    write_jsonl("held_out.jsonl", [text + " held out" for text in numbered(9)])

    def make(**changes):
        fields = {
            "train": [source(path=str(tmp_path / "a.jsonl"), weight=3.0), source(path=str(tmp_path / "b.jsonl"))],
            "eval": [source(path=str(tmp_path / "held_out.jsonl"))],
            "eval_fraction": 0.0, "seq_len": 48, "packing": True, "cache_dir": str(tmp_path / "cache"),
            "chat_template": None, "on_bad_record": "fail",
        }  # fmt: skip
        return SimpleNamespace(**{**fields, **changes})

    return make


def rows_of(batches) -> list[tuple]:
    """The rows of batches that hold tokens, as tuples."""
    return [
        tuple(row.tolist())
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        if mask.any()
    ]


def step(data, size, ranks, micro_batch):
    """One optimizer step of `ranks` ranks that share `data`: rows over all ranks, and the batches of each."""
    start = data.train.state_dict()
    per_rank = []
    for rank in range(ranks):
        data.train.load_state_dict(start)
        per_rank.append(data.train.next_batch(size, rank=rank, ranks=ranks, micro_batch=micro_batch))
    return [row for batches in per_rank for row in rows_of(batches)], per_rank


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 1), (2, 3), (4, 1), (8, 2)])
def test_steps_are_the_same_at_any_layout(ranks, micro_batch, section, tokenizer):
    data, plain = build_data(section(), tokenizer, seed=4), build_data(section(), tokenizer, seed=4)
    for _ in range(6):
        rows, per_rank = step(data, 6, ranks, micro_batch)
        assert sorted(rows) == sorted(rows_of(plain.train.next_batch(6)))
        shapes = {tuple(batch["input_ids"].shape) for batches in per_rank for batch in batches}
        assert shapes == {(micro_batch, 48)}
        assert len({len(batches) for batches in per_rank}) == 1


def test_batches_hold_what_the_loop_expects(section, tokenizer):
    (batch,) = build_data(section(), tokenizer).train.next_batch(4)
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask"}
    assert all(tensor.dtype == torch.int64 and tensor.shape == (4, 48) for tensor in batch.values())
    learned = batch["labels"] != IGNORE
    assert (batch["labels"][learned] == batch["input_ids"][learned]).all()
    assert not learned[batch["position_ids"] == 0].any()
    assert not learned[batch["attention_mask"] == 0].any()


def test_resume_goes_on_where_it_stopped(section, tokenizer):
    whole = build_data(section(), tokenizer, seed=1)
    expected = [rows_of(whole.train.next_batch(5)) for _ in range(9)]
    seen, state = [], None
    for steps in (2, 3, 4):
        data = build_data(section(), tokenizer, seed=1)
        if state:
            data.train.load_state_dict(json.loads(json.dumps(state)))
        seen += [rows_of(data.train.next_batch(5)) for _ in range(steps)]
        state = data.train.state_dict()
    assert seen == expected
    assert {key: type(value) for key, value in state.items()} == {"seed": int, "position": int, "fingerprint": str}


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 64}, {"packing": False}, {"chat_template": "{{ messages }}"}, {"weights": 1}, {"data": 1}],
    ids=lambda change: next(iter(change)),
)
def test_resume_with_other_data_is_refused(change, section, tokenizer, write_jsonl):
    state = build_data(section(), tokenizer).train.state_dict()
    if "data" in change:
        write_jsonl("a.jsonl", numbered(61))
    other = section(**{key: value for key, value in change.items() if key not in ("data", "weights")})
    if "weights" in change:
        other.train[0].weight = 2.0
    with pytest.raises(UserError, match="not that of the checkpoint"):
        build_data(other, tokenizer).train.load_state_dict(state)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (2, 1), (4, 2), (16, 3)])
def test_evaluation_covers_each_row_once_with_equal_counts(ranks, micro_batch, section, tokenizer):
    domain = build_data(section(seq_len=24), tokenizer).eval["held_out"]
    everything = rows_of(domain.batches(micro_batch=1))
    per_rank = [list(domain.batches(rank=r, ranks=ranks, micro_batch=micro_batch)) for r in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {b["input_ids"].shape for batches in per_rank for b in batches} == {(micro_batch, 24)}
    assert sorted(row for batches in per_rank for row in rows_of(batches)) == sorted(everything)
    labels = sum(int((b["labels"] != IGNORE).sum()) for batches in per_rank for b in batches)
    assert labels == domain.rows.meta["label_tokens"]
    assert len(list(domain.batches(limit=1))) == 1


def test_held_out_share_of_the_training_sources(section, tokenizer):
    data = build_data(section(eval=[], eval_fraction=0.3), tokenizer)
    assert list(data.eval) == ["a", "b"]
    counts = [data.summary[side]["a"]["documents"] for side in ("train", "eval")]
    assert sum(counts) == 60
    assert 8 <= counts[1] <= 28


def test_mixture_follows_the_weights(section, tokenizer):
    data = build_data(section(), tokenizer)
    rows = rows_of(data.train.next_batch(400))
    upper = np.mean([tokenizer.decode(row, skip_special_tokens=True).isupper() for row in rows])
    assert abs(upper - 0.25) < 0.01


def test_streamed_parquet_trains_and_resumes(section, tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": numbered(50)}), tmp_path / "s.parquet")
    streamed = section(train=[source(path=str(tmp_path / "s.parquet"), streaming=True)])
    data = build_data(streamed, tokenizer)
    rows, _ = step(data, 4, 2, 1)
    assert data.train.rows is None
    following = rows_of(data.train.next_batch(4))
    again = build_data(streamed, tokenizer)
    assert sorted(rows_of(again.train.next_batch(4))) == sorted(rows)
    resumed = build_data(streamed, tokenizer)
    resumed.train.load_state_dict(again.train.state_dict())
    assert rows_of(resumed.train.next_batch(4)) == following


def test_evaluation_alone_and_offline_corpora(section, tokenizer, monkeypatch):
    monkeypatch.setattr("moe_dist.data.loader.CORPUS_MEGABYTES", 0.5)
    only_eval = section(
        train=[], eval=[source(corpus="prose", split="eval"), source(corpus="docstrings", split="eval")]
    )
    data = build_data(only_eval, tokenizer)
    assert data.train is None
    assert list(data.eval) == ["prose", "docstrings"]


def test_wrong_sections_are_refused_before_anything_is_read(section, tmp_path):
    check_data(section())
    check_data(section(train=[source(hub="org/name"), source(corpus="prose")]))
    for train, message in [
        ([source(path=str(tmp_path / "none.jsonl"))], r"none\.jsonl: no such file"),
        ([source()], "exactly one of path, hub and corpus"),
        ([source(hub="a/b", corpus="prose")], "exactly one of path, hub and corpus"),
        ([source(hub="x/a"), source(hub="y/a")], "several sources are called a"),
        ([source(corpus="poetry")], "unknown offline corpus 'poetry'"),
    ]:
        with pytest.raises(UserError, match=message):
            check_data(section(train=train))


def test_streamed_evaluation_is_refused(section, tokenizer):
    with pytest.raises(UserError, match="cannot be streamed"):
        build_data(section(eval=[source(hub="org/name", streaming=True)]), tokenizer)
