"""Texts end with exactly one eos; records keep their order; hashes follow what decides the tokens."""

import copy

import pytest

from moe_dist.data.encode import BATCH, Encoder, tokenizer_hash
from moe_dist.data.records import Record, RecordLog
from moe_dist.errors import UserError
from tests.data.conftest import numbered


def text(content, origin="f:1"):
    return Record(text=content, messages=None, origin=origin)


def test_text_is_bos_tokens_eos_all_learned(tokenizer):
    (ids, loss), (with_eos, _) = Encoder(tokenizer).encode([text("the fox"), text("the fox<|eos|>")], RecordLog())
    assert tokenizer.decode(ids) == "<|bos|>the fox<|eos|>"
    assert loss.all()
    assert with_eos.tolist() == ids.tolist()


def test_order_is_kept_over_batches_and_kinds(tokenizer):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]
    records = [text(t) for t in numbered(BATCH + 20)]
    records[3] = records[BATCH + 5] = Record(text=None, messages=talk, origin="f:4")
    encoded = list(Encoder(tokenizer).encode(records, RecordLog()))
    assert len(encoded) == len(records)
    for record, (ids, loss) in zip(records, encoded, strict=True):
        expected = "<|bos|><|user|>q<|assistant|>the answer" if record.text is None else "<|bos|>" + record.text
        assert tokenizer.decode(ids) == expected + "<|eos|>"
        assert loss.all() == (record.text is not None)


def test_refused_conversation_follows_the_policy(tokenizer):
    records = [Record(text=None, messages=[{"role": "assistant", "content": "a"}], origin="f:9"), text("fine")]
    encoder = Encoder(tokenizer, chat_template="{{ raise_exception('needs a user') }}")
    book = RecordLog(on_bad="skip")
    assert len(list(encoder.encode(records, book))) == 1
    assert book.places == {"chat_template": ["f:9"]}
    with pytest.raises(UserError, match=r"f:9: .*needs a user"):
        list(encoder.encode(records, RecordLog()))


def test_missing_template_and_missing_eos_are_errors(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    record = Record(text=None, messages=[{"role": "assistant", "content": "a"}], origin="f:9")
    with pytest.raises(UserError, match=r"f:9: .*no chat template.*data\.chat_template"):
        list(Encoder(bare).encode([record], RecordLog(on_bad="skip")))
    bare.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        Encoder(bare)


def test_hash_ignores_padding_state_and_sees_special_tokens(tokenizer):
    before = tokenizer_hash(tokenizer)
    other = copy.deepcopy(tokenizer)
    other(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(other) == before
    other.eos_token = "<|user|>"
    assert tokenizer_hash(other) != before
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["brownfox"])
    assert tokenizer_hash(other) != before
