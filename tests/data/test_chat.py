"""The loss lies on the assistant's answers, told by the template or by verified prefixes."""

import hashlib

import numpy as np
import pytest

from moe_dist.data.chat import encode_chat, resolve_template, template_hash
from moe_dist.data.corpora import CHAT_TEMPLATE
from moe_dist.errors import UserError

MARKED = CHAT_TEMPLATE
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "jumps over — 狐狸"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "wait"},
]
# Drops what earlier answers say before "###", as templates of reasoning models do.
REWRITES = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('###')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def learned(tokenizer, ids, loss):
    """The texts of the contiguous learned spans."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marks", "prefixes"])
def test_only_answers_and_their_end_are_learned(template, tokenizer):
    ids, loss = encode_chat(tokenizer, TALK, template)
    assert learned(tokenizer, ids, loss) == ["jumps over — 狐狸<|eos|>", "wait<|eos|>"]
    whole = tokenizer.apply_chat_template(TALK, chat_template=MARKED, return_dict=True)["input_ids"]
    assert ids.tolist() == whole
    assert (ids.dtype, loss.dtype) == (np.int32, bool)


def test_white_space_after_the_end_mark_is_not_learned(tokenizer):
    template = UNMARKED.replace("+ eos_token }}", "+ eos_token + '\n' }}")
    assert template != UNMARKED
    ids, loss = encode_chat(tokenizer, TALK, template)
    assert learned(tokenizer, ids, loss) == ["jumps over — 狐狸<|eos|>", "wait<|eos|>"]


def test_template_that_rewrites_earlier_turns_is_refused_where_it_matters(tokenizer):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "thought ### the dog"}]
    ids, loss = encode_chat(tokenizer, talk, REWRITES)
    assert learned(tokenizer, ids, loss) == ["thought ### the dog<|eos|>"]
    with pytest.raises(UserError, match=r"f:7: .*message 2 differently once others follow.*generation"):
        encode_chat(tokenizer, [*talk, *talk], REWRITES, origin="f:7")


def test_template_that_raises_or_teaches_nothing_names_the_place(tokenizer):
    with pytest.raises(UserError, match=r"f:3: the chat template refuses the conversation: no tools"):
        encode_chat(tokenizer, TALK, "{{ raise_exception('no tools') }}", origin="f:3")
    with pytest.raises(UserError, match=r"f:3: .*no answer tokens"):
        encode_chat(tokenizer, TALK[:2], MARKED, origin="f:3")


def test_template_from_tokenizer_text_or_file(tokenizer, tmp_path):
    assert resolve_template(tokenizer) == CHAT_TEMPLATE
    assert resolve_template(tokenizer, "{{ messages }}") == "{{ messages }}"
    (tmp_path / "t.jinja").write_text(UNMARKED)
    assert resolve_template(tokenizer, str(tmp_path / "t.jinja")) == UNMARKED
    with pytest.raises(UserError, match="neither Jinja text nor a readable file"):
        resolve_template(tokenizer, str(tmp_path / "missing.jinja"))
    assert template_hash("abc") == hashlib.sha256(b"abc").hexdigest()
    assert template_hash(None) is None
