"""The data of a run: training batches that resume anywhere, and held-out sets by domain.

    data = build_data(config.data, tokenizer, seed=config.run.seed)
    for batch in data.train.next_batch(global_batch, rank=r, ranks=D, micro_batch=m): ...
    for name, domain in data.eval.items(): for batch in domain.batches(rank=r, ranks=D, micro_batch=m): ...

A batch is a dict of int64 tensors [m, seq_len]: input_ids, labels, position_ids, attention_mask (see
`moe_dist.data.packing`); `moe_dist.data.attention.model_inputs` makes the model's arguments of it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.data.cache import PackedRows, cached_rows
from moe_dist.data.corpora import check_corpus, corpus_file
from moe_dist.data.encode import Encoder
from moe_dist.data.fingerprint import digest
from moe_dist.data.packing import assemble, collate
from moe_dist.data.records import describe_log
from moe_dist.data.sampler import IndexSampler, rank_share
from moe_dist.data.sources import TextSource, hub_source, local_source
from moe_dist.data.stream import StreamRows
from moe_dist.errors import UserError

log = logging.getLogger(__name__)

CACHE_DIR = "~/.cache/moe_dist"
# Text of all offline corpora together, where sources name them.
CORPUS_MEGABYTES = 4.0


class TrainData:
    """Training rows of weighted sources.

    sources: {name: rows}, rows being PackedRows, StreamRows or any sequence of row dicts with `seq_len` and `pad_id`.
    sampler: the order (its state is the state of the data).
    """

    def __init__(self, sources: dict, sampler: IndexSampler, *, seq_len: int, pad_id: int):
        self.names = list(sources)
        self.sampler = sampler
        self._rows = list(sources.values())
        self._padding = assemble([], seq_len, pad_id)

    @property
    def rows(self) -> int | None:
        """Rows of all sources together; None where one is a stream."""
        return None if None in self.sampler.rows else sum(self.sampler.rows)

    def next_batch(self, size: int, *, rank: int = 0, ranks: int = 1, micro_batch: int | None = None) -> list[dict]:
        """This data rank's micro-batches of the next optimizer step, `size` rows over all ranks; moves on.

        Every rank gets the same number of micro-batches of one shape [micro_batch, seq_len] (all of its rows in one
        when None); where `size` does not divide, the last ones are filled up with rows of padding, without labels.
        """
        micro_batch = micro_batch or -(-size // ranks)
        shares = rank_share(self.sampler.next_batch(size), rank=rank, ranks=ranks, micro_batch=micro_batch)
        return [
            collate([self._padding if at is None else self._rows[at[0]][at[1]] for at in share]) for share in shares
        ]

    def drawn(self, state: dict, size: int, *, micro_batch: int) -> list[list[tuple[str, int]]]:
        """What `next_batch(size, ...)` gives out after `state`: (source, row) of each row of each micro-batch, those of
        all ranks; number a·D + r is micro-batch a of rank r of D. Moves nothing."""
        rows = [(self.names[source], row) for source, row in self.sampler.batch_at(state["position"], size)]
        return [rows[start : start + micro_batch] for start in range(0, size, micro_batch)]

    def state_dict(self) -> dict:
        """Seed, position and fingerprint: integers and a string, the same on every rank."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state was taken, on any number of ranks; UserError if the data is another."""
        self.sampler.load_state_dict(state)


@dataclass(frozen=True)
class EvalSet:
    """A held-out domain, read in a fixed order."""

    name: str
    rows: PackedRows

    def batches(self, *, rank: int = 0, ranks: int = 1, micro_batch: int = 1, limit: int | None = None) -> Iterator:
        """This data rank's batches [micro_batch, seq_len], the same number on every rank.

        Ranks that run short get rows of padding, which have no labels. limit: at most this many batches a rank; for
        figures that do not depend on the number of ranks, limit rows instead (a source's `limit`).
        """
        padding = assemble([], self.rows.seq_len, self.rows.pad_id)
        shares = rank_share(range(len(self.rows)), rank=rank, ranks=ranks, micro_batch=micro_batch)
        for share in shares[:limit]:
            yield collate([padding if row is None else self.rows[row] for row in share])


@dataclass(frozen=True)
class Data:
    """What `build_data` gives: `train` (None without training sources), `eval` by name, and a summary for the log."""

    train: TrainData | None
    eval: dict[str, EvalSet]
    summary: dict


def build_data(data, tokenizer, *, seed: int = 0) -> Data:
    """Open, tokenise (or find in the cache) and arrange all sources of a config's `data` section.

    data: object with the attributes of the section: train and eval (lists of sources), eval_fraction, seq_len,
    packing, cache_dir, chat_template, on_bad_record. A source has path | hub | corpus, name, subset, revision, split,
    format, field, weight, streaming, limit. Safe to call from several processes at once.
    UserError for everything that is wrong with sources, records or cache.
    """
    encoder = Encoder(tokenizer, chat_template=data.chat_template)
    cache = Path(data.cache_dir or CACHE_DIR).expanduser()
    train, held_out = _sides(data, cache)
    options = {"seq_len": data.seq_len, "packing": data.packing, "seed": seed, "on_bad": data.on_bad_record}
    rows = {
        source.name: StreamRows(source, encoder, **options)
        if source.streaming
        else cached_rows(cache, source, encoder, **options)
        for source in train
    }
    evals = {}
    for source in held_out:
        if source.streaming:
            raise UserError(f"data.eval: '{source.name}' cannot be streamed; bound it with 'limit' instead")
        evals[source.name] = EvalSet(source.name, cached_rows(cache, source, encoder, **options))
    summary = {
        "train": {name: _summary(one) for name, one in rows.items()},
        "eval": {name: _summary(one.rows) for name, one in evals.items()},
        "tokenizer": encoder.identity["tokenizer"],
        "chat_template": encoder.identity["template"],
    }
    if not train:
        return Data(None, evals, summary)
    weights = [float(source.weight) for source in data.train]
    sampler = IndexSampler(
        [None if isinstance(one, StreamRows) else len(one) for one in rows.values()],
        weights=weights,
        seed=seed,
        fingerprint=digest([weights, *(_fingerprint(one) for one in rows.values())]),
    )
    return Data(TrainData(rows, sampler, seq_len=data.seq_len, pad_id=encoder.pad_id), evals, summary)


def train_sources(data) -> list[TextSource]:
    """The sources of `data.train` as they are, for those who want documents and not rows; checked, not yet read."""
    return _sides(data, Path(data.cache_dir or CACHE_DIR).expanduser())[0]


def check_data(data) -> None:
    """What can be checked of a config's `data` section without reading text or network; UserError if it is wrong."""
    for source in [*data.train, *data.eval]:
        _open(source, None)
    _unique([_name(source) for source in data.train], "data.train")
    _unique([_name(source) for source in data.eval], "data.eval")


def _sides(data, cache: Path) -> tuple[list[TextSource], list[TextSource]]:
    train = [_open(source, cache) for source in data.train]
    held_out = [_open(source, cache) for source in data.eval]
    if not held_out and data.eval_fraction > 0:
        pairs = [source.split_held_out(data.eval_fraction) for source in train]
        train, held_out = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    _unique([source.name for source in train], "data.train")
    _unique([source.name for source in held_out], "data.eval")
    return train, held_out


def _open(source, cache: Path | None) -> TextSource | None:
    """The TextSource of one source of the config; without a cache it is checked only, and nothing is written."""
    given = [key for key in ("path", "hub", "corpus") if getattr(source, key)]
    if len(given) != 1:
        raise UserError(f"a data source needs exactly one of path, hub and corpus, got {given or 'none'}")
    options = {
        "name": _name(source),
        "kind": source.format,
        "field_name": source.field,
        "streaming": source.streaming,
        "limit": source.limit,
    }
    if source.hub:
        return hub_source(source.hub, subset=source.subset, revision=source.revision, split=source.split, **options)
    if source.corpus:
        check_corpus(source.corpus, source.split)
        if cache is None:
            return None
        return local_source(corpus_file(cache, source.corpus, source.split, megabytes=CORPUS_MEGABYTES), **options)
    return local_source(source.path, split=source.split, **options)


def _name(source) -> str:
    if source.name:
        return source.name
    given = source.corpus or source.hub or source.path or "?"
    return str(given).rstrip("/").split("/")[-1].split(".")[0] or str(given)


def _unique(names: Sequence[str], section: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{section}: several sources are called {', '.join(twice)}; give each its own 'name'")


def _fingerprint(rows) -> str:
    return rows.fingerprint if isinstance(rows, StreamRows) else digest(rows.meta["identity"])


def _summary(rows) -> dict:
    """Counts of one source, and its bad records, which are also logged."""
    if isinstance(rows, StreamRows):
        return {"streaming": True}
    for line in describe_log(rows.meta["book"], rows.meta["name"]):
        log.warning(line)
    counts = ("documents", "tokens", "label_tokens", "unused_tokens", "rows", "fill")
    return {key: rows.meta[key] for key in counts} | {"book": rows.meta["book"]}
