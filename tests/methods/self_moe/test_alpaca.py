"""The Alpaca template on generated data: the prompt is the published one, and the loss covers the response alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dist.config.load import build
from moe_dist.data.corpora import train_tokenizer
from moe_dist.data.loader import build_data
from moe_dist.data.packing import IGNORE

TEMPLATE = str(Path(__file__).parents[3] / "configs" / "self_moe" / "alpaca.jinja")
PAIRS = [("Add 2 and 3.", "5"), ("Name a colour.\nOne word only.", "red\n"), ("Say ### Response:", " the words\n\n")]
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@pytest.mark.parametrize("packing", [False, True])
def test_labels_are_the_responses_and_their_end(tmp_path, packing):
    records = [
        {
            "id": f"math-{number}",
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
            "skill": "math",
            "provenance": {"seeds": [number], "model": "sampled:0"},
        }
        for number, (ask, answer) in enumerate(PAIRS)
    ]
    file = tmp_path / "math.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_tokenizer([PROMPT] + [text for pair in PAIRS for text in pair], vocab_size=400)
    config = build(
        {
            "model": {"path": "unused"},
            "data": {
                "train": {"math": str(file)},
                "seq_len": 600,
                "packing": packing,
                "chat_template": TEMPLATE,
                "cache_dir": str(tmp_path / "cache"),
            },
        }
    )
    data = build_data(config.data, tokenizer, seed=0)
    rows = data.train.rows
    assert rows == (1 if packing else 3)
    (batch,) = data.train.next_batch(rows, micro_batch=rows)
    documents = set()
    for ids, labels, mask, positions in zip(
        batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(),
        batch["position_ids"].tolist(), strict=True,
    ):  # fmt: skip
        starts = [place for place, position in enumerate(positions) if position == 0 and mask[place]]
        for start, stop in zip(starts, [*starts[1:], sum(mask)], strict=True):
            learned = [place for place in range(start, stop) if labels[place] != IGNORE]
            assert [labels[place] for place in learned] == [ids[place] for place in learned]
            assert learned == list(range(learned[0], stop))  # one run of tokens, to the end
            documents.add((tokenizer.decode(ids[start : learned[0]]), tokenizer.decode(ids[learned[0] : stop])))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert documents == {(bos + PROMPT.format(instruction=ask), answer + eos) for ask, answer in PAIRS}
