"""Documents into rows of one length, so that neither attention nor loss crosses from one document to another.

(Rows of `data.packing: esft` are put together by `moe_dist.data.concat` and come here as documents of their own.)

What a row holds (all of length L):
  input_ids       tokens of its documents one after another, then padding
  labels          input_ids where a token is to be learned, else -100; aligned with input_ids, the loss shifts them
                  (the logits at position i are compared with the label at i + 1). The first token of a document is
                  always -100: the shifted loss would predict it from the last token of the document before.
  position_ids    0, 1, 2, ... from the start of every document; padding counts as one more document
  attention_mask  1 for tokens, 0 for padding

What the model is given: input_ids and position_ids, with `attention_mask=None` and `use_cache=False` (see
`moe_dist.data.attention`). Padding needs no mask there: it lies to the right as a document of its own, nothing
attends to it, and no query is left without a key (whose softmax would be NaN in some kernels). attention_mask is for
what is not attention: the MoE layer leaves padding out of its statistics and balance losses.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from moe_dist.data.concat import concatenate

IGNORE = -100


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Group items so that the lengths of a group sum to at most `capacity`.

    Takes items from the longest to the shortest (equal ones in order) and puts each into the fullest group that
    still has room. lengths: int [n], each between 1 and capacity. Returns lists of indices into lengths.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    groups: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some group has room for exactly r tokens
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            group = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        left = room - length
        if left:
            by_room[left].append(group)
            rooms |= 1 << left
    return groups


def arrange(documents: Iterable, *, seq_len: int, packing: bool | str, seed: int) -> Iterator:
    """The documents (ids, loss) that rows are made of: as they come, or already put together for `packing="esft"`."""
    return concatenate(documents, seq_len, seed=seed) if packing == "esft" else iter(documents)


def cut(loss: np.ndarray, seq_len: int) -> list[tuple[int, int]]:
    """Cut a document into pieces of at most seq_len tokens: (start, length), without those that teach nothing.

    loss: bool [n]. A piece is a document of its own from then on, so its first token is never predicted; a piece
    with no other token to learn would be padding under another name.
    """
    pieces = []
    for start in range(0, len(loss), seq_len):
        length = min(seq_len, len(loss) - start)
        if loss[start + 1 : start + length].any():
            pieces.append((start, length))
    return pieces


def assemble(pieces: list[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """One row from its pieces (ids int [n], loss bool [n]); no piece at all gives a row of padding.

    Returns int64 arrays [seq_len]: input_ids, labels, position_ids, attention_mask (module docstring).
    """
    row = {
        "input_ids": np.full(seq_len, pad_id, dtype=np.int64),
        "labels": np.full(seq_len, IGNORE, dtype=np.int64),
        "position_ids": np.empty(seq_len, dtype=np.int64),
        "attention_mask": np.zeros(seq_len, dtype=np.int64),
    }
    at = 0
    for ids, loss in pieces:
        end = at + len(ids)
        assert end <= seq_len
        row["input_ids"][at:end] = ids
        row["labels"][at:end] = np.where(loss, ids, IGNORE)
        row["labels"][at] = IGNORE
        row["position_ids"][at:end] = np.arange(end - at)
        row["attention_mask"][at:end] = 1
        at = end
    row["position_ids"][at:] = np.arange(seq_len - at)
    return row


def collate(rows: list[dict[str, np.ndarray]]) -> dict:
    """Stack rows into int64 torch tensors [B, L] under the same names."""
    import torch

    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
