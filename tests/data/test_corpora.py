"""The offline corpora: named domains of real text, split by document, and a tokenizer that transformers loads."""

import hashlib
import json

import pytest

from moe_dist.data.chat import encode_chat
from moe_dist.data.corpora import DOMAINS, _split_docstrings, corpus_file, prepare_quickstart
from moe_dist.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "text"
    return folder, prepare_quickstart(folder, megabytes=0.5, vocab_size=1024)


def documents(folder, manifest, split):
    lines = {name: (folder / manifest["domains"][name][split]["file"]).read_text("utf-8") for name in DOMAINS}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in lines.items()}


def test_domains_are_split_by_document(prepared):
    folder, manifest = prepared
    train, held_out = documents(folder, manifest, "train"), documents(folder, manifest, "eval")
    train_ids = {d["id"] for name in ("python_code", "docstrings") for d in train[name]}
    eval_ids = {d["id"] for name in ("python_code", "docstrings") for d in held_out[name]}
    assert not train_ids & eval_ids
    assert not {d["id"] for d in train["prose"]} & {d["id"] for d in held_out["prose"]}
    size = sum(len(d["text"].encode()) for side in (train, held_out) for docs in side.values() for d in docs)
    assert 400_000 < size <= 500_000
    for name in DOMAINS:
        share = len(held_out[name]) / len(train[name])
        assert 0.01 < share < 0.25
        entry = manifest["domains"][name]["train"]
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_same_text_and_tokenizer_every_time(prepared, tmp_path):
    folder, manifest = prepared
    again = prepare_quickstart(tmp_path / "again", megabytes=0.5, vocab_size=1024)
    assert again == manifest
    name = "tokenizer/tokenizer.json"
    assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_tokenizer_loads_and_round_trips(prepared):
    from transformers import AutoTokenizer

    folder, manifest = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / manifest["tokenizer"])
    assert len(tokenizer) == 1024
    text = documents(folder, manifest, "eval")["python_code"][0]["text"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) < len(text.encode()) / 2
    talk = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    ids, loss = encode_chat(tokenizer, talk, tokenizer.chat_template)
    assert tokenizer.decode(ids[loss]) == "because<|eos|>"


def test_prepared_folder_is_left_alone_or_made_anew(prepared, tmp_path):
    folder, manifest = prepared
    stamp = (folder / "prepared.json").stat().st_mtime_ns
    assert prepare_quickstart(folder, megabytes=0.5, vocab_size=1024) == manifest
    assert (folder / "prepared.json").stat().st_mtime_ns == stamp
    small = prepare_quickstart(tmp_path / "text", megabytes=0.5, vocab_size=None)
    assert not (tmp_path / "text" / "tokenizer").exists()
    assert small["domains"] == manifest["domains"]
    assert prepare_quickstart(tmp_path / "text", megabytes=0.4, vocab_size=None) != small


def test_foreign_folder_and_wrong_sizes_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something that is not prepared text"):
        prepare_quickstart(tmp_path, megabytes=0.5)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(UserError, match="vocab_size at least 262"):
        prepare_quickstart(tmp_path / "new", megabytes=0.5, vocab_size=100)
    with pytest.raises(UserError, match="ask for more"):
        prepare_quickstart(tmp_path / "new", megabytes=0.001)
    assert not (tmp_path / "new").exists()


def test_corpus_by_name(tmp_path):
    path = corpus_file(tmp_path, "docstrings", "eval", megabytes=0.5)
    assert path.read_text("utf-8").startswith('{"text"')
    with pytest.raises(UserError, match="corpora are python_code, docstrings, prose"):
        corpus_file(tmp_path, "poetry", "train")


def test_docstrings_leave_the_code():
    source = '"""Module."""\nx = 1\n\ndef f():\n    """Of f,\n    two lines."""\n    return "kept"\n'
    code, docs = _split_docstrings(source)
    assert code == 'x = 1\n\ndef f():\n    return "kept"\n'
    assert docs == "Module.\n\nOf f,\ntwo lines."
    assert _split_docstrings("def broken(") == ("", "")
