"""Data that is not what it was, and templates that differ."""

from __future__ import annotations

import json

import pytest

from moe_dist.data.loader import build_data
from moe_dist.errors import UserError
from tests.data.conftest import tokenizer, write_jsonl  # noqa: F401 - fixtures
from tests.data.test_loader import section, source  # noqa: F401 - a fixture among them

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


def chats(folder):
    file = folder / "chat.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source(path=str(file))


def test_fault_31_a_document_of_ten_megabytes(section, tokenizer, tmp_path):  # noqa: F811
    file = tmp_path / "mixed.jsonl"
    lines = [{"text": "short"}, {"text": "x " * 5_000_000}, {"text": ""}, {"body": "no text"}, {"text": "the last"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    fields = {"train": [source(path=str(file), name="mixed")]}
    with pytest.raises(UserError, match=r"mixed\.jsonl:2: .*10,000,000 bytes.*data\.on_bad_record=skip"):
        build_data(section(**fields), tokenizer)
    summary = build_data(section(**fields, on_bad_record="skip"), tokenizer).summary["train"]["mixed"]
    assert summary["documents"] == 2
    assert summary["book"]["bad"] == {"too_large": 1, "empty": 1, "missing_field": 1, "corrupt_json": 1}
    assert summary["book"]["places"]["corrupt_json"] == [f"{file}:6"]


def test_fault_34_another_template_is_recorded_and_no_resume(section, tokenizer, tmp_path):  # noqa: F811
    train = [chats(tmp_path)]
    first = build_data(section(train=train, chat_template=TEMPLATE), tokenizer)
    other = build_data(section(train=train, chat_template=TEMPLATE.replace("<", "[")), tokenizer)
    same = build_data(section(train=train, chat_template=TEMPLATE), tokenizer)
    assert first.summary["chat_template"] == same.summary["chat_template"] != other.summary["chat_template"]
    same.train.load_state_dict(first.train.state_dict())
    with pytest.raises(UserError, match="template"):
        other.train.load_state_dict(first.train.state_dict())
