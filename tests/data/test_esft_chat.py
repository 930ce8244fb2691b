"""The chat format of the ESFT repository, as configs/esft/paper.yaml gives it, against tokens put together by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from moe_dist.config.load import load
from moe_dist.data.chat import encode_chat
from moe_dist.data.corpora import CHAT_TEMPLATE
from moe_dist.data.encode import Encoder
from moe_dist.data.records import RecordLog
from moe_dist.data.sources import local_source
from moe_dist.errors import UserError

ROOT = Path(__file__).parents[2]
TEMPLATE = load(ROOT / "configs" / "esft" / "paper.yaml").data.chat_template
INTENT = ROOT.parent / "shared" / "data" / "esft" / "intent_train.jsonl"
IGNORE = -100
TALK = [
    {"role": "user", "content": "  the quick fox?\n"},
    {"role": "assistant", "content": '\njumps over — 狐狸: {"a": 1}。\n\n'},
    {"role": "user", "content": "and\n\nthe dog?"},
    {"role": "assistant", "content": "wait", "mask": 1},
    {"role": "user", "content": "for tokens"},
    {"role": "assistant", "content": "their experts wait ", "mask": 0},
]


def by_hand(tokenizer, messages) -> tuple[list[int], list[int]]:
    """(ids, labels): bos, then each message's own tokens; prompts and masked answers are not learned, bos is."""
    ids, labels = [tokenizer.bos_token_id], [tokenizer.bos_token_id]
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "user":
            part = tokenizer.encode(f"User: {text}\n\nAssistant:", add_special_tokens=False)
            learned = False
        else:
            part = [*tokenizer.encode(f" {text}", add_special_tokens=False), tokenizer.eos_token_id]
            learned = message.get("mask", 0) != 1
        ids += part
        labels += part if learned else [IGNORE] * len(part)
    return ids, labels


def labels_of(ids: np.ndarray, loss: np.ndarray) -> list[int]:
    return np.where(loss, ids, IGNORE).tolist()


def trimming(tokenizer):
    """The same tokenizer with offsets that leave a token's leading space out, as Llama's have them."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )


@pytest.mark.parametrize("kind", ["plain offsets", "trimmed offsets"])
@pytest.mark.parametrize("length", [2, 4, 6])
def test_tokens_and_labels(tokenizer, kind, length):
    tokenizer = tokenizer if kind == "plain offsets" else trimming(tokenizer)
    talk = TALK[:2] if length == 2 else TALK[-length:]
    ids, loss = encode_chat(tokenizer, talk, TEMPLATE)
    expected_ids, expected_labels = by_hand(tokenizer, talk)
    assert ids.tolist() == expected_ids
    assert labels_of(ids, loss) == expected_labels
    assert IGNORE in expected_labels
    assert tokenizer.eos_token_id in expected_labels


def test_the_text_is_the_repositorys(tokenizer):
    ids, _ = encode_chat(tokenizer, TALK[:4], TEMPLATE)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert tokenizer.decode(ids) == (
        f'{bos}User: the quick fox?\n\nAssistant: jumps over — 狐狸: {{"a": 1}}。{eos}'
        f"User: and\n\nthe dog?\n\nAssistant: wait{eos}"
    )


def test_other_roles_and_answers_that_are_all_masked_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"f:1: .*the ESFT format has no role system"):
        encode_chat(tokenizer, [{"role": "system", "content": "be brief"}, *TALK], TEMPLATE, origin="f:1")
    with pytest.raises(UserError, match=r"f:2: .*no answer tokens"):
        encode_chat(tokenizer, TALK[2:4], TEMPLATE, origin="f:2")


def test_a_mask_that_the_template_would_overlook_is_refused(tokenizer):
    with pytest.raises(UserError, match="f:3: a message has `mask`, which the chat template does not look at"):
        encode_chat(tokenizer, TALK, CHAT_TEMPLATE, origin="f:3")
    unmasked = [{**message, "mask": 0} for message in TALK]
    assert encode_chat(tokenizer, unmasked, CHAT_TEMPLATE)[1].any()


@pytest.mark.skipif(not INTENT.exists(), reason="the intent task's instruct data is not on this machine")
def test_real_conversations(tokenizer):
    encoder = Encoder(tokenizer, chat_template=TEMPLATE)
    source = local_source(INTENT, limit=400)
    found = list(encoder.encode(source.records(RecordLog()), RecordLog()))
    lines = INTENT.read_text("utf-8").splitlines()[:400]
    assert len(found) == len(lines) == 400
    for (ids, loss), line in zip(found, lines, strict=True):
        expected_ids, expected_labels = by_hand(tokenizer, json.loads(line)["messages"])
        assert ids.tolist() == expected_ids
        assert labels_of(ids, loss) == expected_labels
