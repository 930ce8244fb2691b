"""Real text that any machine with Python holds, as named domains, and a small tokenizer trained on it.

  python_code  the modules of the standard library, their docstrings taken out
  docstrings   the docstrings of those modules
  prose        the topics of Python's own help (`pydoc_data`)

A module's code and docstrings are held out together, so that no held-out text was seen under another name.
"""

import ast
import hashlib
import json
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_dist.data.atomic import locked, new_folder, remove_debris, write_durably
from moe_dist.errors import UserError

CORPORA_VERSION = 1
DOMAINS = ("python_code", "docstrings", "prose")
HELD_OUT_SHARE = 1 / 16
_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test",
    "encodings", "pydoc_data", "lib2to3", "ensurepip",
}  # fmt: skip
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def prepare_quickstart(folder: str | Path, *, megabytes: float = 4.0, vocab_size: int | None = 4096) -> dict:
    """Write the offline corpora, and a tokenizer trained on them, into `folder`; a whole one is left as it is.

    megabytes: text in all, over all domains, training and held-out. vocab_size: of the tokenizer; None for none.
    Leaves <folder>/train/<domain>.jsonl, <folder>/eval/<domain>.jsonl ({"text", "id"} a line) and
    <folder>/tokenizer, which AutoTokenizer loads. The same on every call with one Python version.
    Returns the manifest, also at <folder>/prepared.json: {"domains": {name: {"train": {"file", "documents",
    "bytes", "sha256"}, "eval": {...}}}, "tokenizer": path or None, ...}, files relative to `folder`.
    UserError if `folder` holds something else, or the arguments leave nothing.
    """
    folder = Path(folder).expanduser()
    if megabytes <= 0 or (vocab_size is not None and vocab_size < 256 + len(SPECIAL_TOKENS)):
        raise UserError(
            f"megabytes must be above 0 and vocab_size at least {256 + len(SPECIAL_TOKENS)} (all bytes and the "
            f"special tokens), got {megabytes} and {vocab_size}"
        )
    wanted = {
        "version": CORPORA_VERSION,
        "python": platform.python_version(),
        "megabytes": megabytes,
        "vocab_size": vocab_size,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock") as held:
            if (found := _manifest(folder)) and all(found.get(key) == value for key, value in wanted.items()):
                return found
            if held:
                remove_debris(folder)
            if found:
                shutil.rmtree(folder)
            elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder}: holds something that is not prepared text; give another folder")
            with new_folder(folder, marker="prepared.json") as temporary:
                manifest = wanted | _write(temporary, megabytes, vocab_size)
                write_durably(temporary / "prepared.json", json.dumps(manifest, indent=1).encode("utf-8"))
            return manifest
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error


def corpus_file(root: Path, name: str, split: str, *, megabytes: float = 4.0) -> Path:
    """The JSONL file of one offline corpus ("train" or "eval" split), written under `root` if it is not there."""
    check_corpus(name, split)
    manifest = prepare_quickstart(Path(root) / "corpora", megabytes=megabytes, vocab_size=None)
    return Path(root) / "corpora" / manifest["domains"][name][split]["file"]


def check_corpus(name: str, split: str) -> None:
    """UserError unless there is such an offline corpus and split."""
    if name not in DOMAINS or split not in ("train", "eval"):
        raise UserError(
            f"unknown offline corpus '{name}' or split '{split}'; corpora are {', '.join(DOMAINS)}, "
            "splits are train and eval"
        )


def _manifest(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "prepared.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _write(folder: Path, megabytes: float, vocab_size: int | None) -> dict:
    documents = _collect(int(megabytes * 1_000_000))
    domains = {}
    for split in ("train", "eval"):
        (folder / split).mkdir()
        for domain, entries in documents.items():
            lines = [
                json.dumps({"text": text, "id": name}, ensure_ascii=False)
                for name, text in entries
                if (_draw(name) < HELD_OUT_SHARE) == (split == "eval")
            ]
            if not lines:
                raise UserError(f"{megabytes} MB leave the corpus '{domain}' without {split} text; ask for more")
            data = ("\n".join(lines) + "\n").encode("utf-8")
            write_durably(folder / split / f"{domain}.jsonl", data)
            domains.setdefault(domain, {})[split] = {
                "file": f"{split}/{domain}.jsonl",
                "documents": len(lines),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    if vocab_size is not None:
        texts = [text for entries in documents.values() for name, text in entries if _draw(name) >= HELD_OUT_SHARE]
        train_tokenizer(texts, vocab_size=vocab_size).save_pretrained(folder / "tokenizer")
    return {"domains": domains, "tokenizer": None if vocab_size is None else "tokenizer"}


def train_tokenizer(texts: list[str], *, vocab_size: int):
    """A byte-level BPE tokenizer (transformers, fast) with bos, eos, pad and a chat template that marks answers.

    Its vocabulary has at most vocab_size entries. Texts get a leading bos; the same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS[:3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on a document's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") / 2**64


def _place(name: str) -> tuple[float, str]:
    """Sort key of a document, independent of the side on which it falls."""
    return _draw("order of " + name), name


def _collect(budget: int) -> dict[str, list[tuple[str, str]]]:
    """{domain: [(name, text)]} with at most `budget` bytes in all; prose gives what it has, at most a third."""
    prose = _take(_topics(), budget // 3)
    rest = (budget - sum(len(text.encode("utf-8")) for _, text in prose)) // 2
    code, docs, sizes = [], [], [0, 0]
    for name, source in _modules():
        if min(sizes) >= 0.9 * rest:  # parsing on for the last bytes would take longer than all before
            break
        for kind, (entries, text) in enumerate(zip((code, docs), _split_docstrings(source), strict=True)):
            size = len(text.encode("utf-8"))
            if text.strip() and sizes[kind] + size <= rest:
                entries.append((name, text))
                sizes[kind] += size
    return {"python_code": code, "docstrings": docs, "prose": prose}


def _take(entries, budget: int) -> list[tuple[str, str]]:
    taken = []
    for name, text in entries:
        budget -= len(text.encode("utf-8"))
        if budget >= 0:
            taken.append((name, text))
    return taken


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python has no pydoc_data, from which the corpus 'prose' is made") from error
    for name in sorted(topics, key=_place):
        yield name, topics[name]


def _modules() -> Iterator[tuple[str, str]]:
    """(path below the standard library, source) of its modules, in an order that mixes packages."""
    library = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in _LEFT_OUT]  # site-packages may hold anything
        names += [Path(folder, file).relative_to(library).as_posix() for file in files if file.endswith(".py")]
    for name in sorted(names, key=_place):
        try:
            yield name, (library / name).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _split_docstrings(source: str) -> tuple[str, str]:
    """(source without its docstrings, the docstrings one below the other); ("", "") for what does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""
    lines = source.split("\n")
    docs = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text and text.strip():
            docs.append((node.body[0].lineno, text))
            for line in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[line] = None
    code = "\n".join(line for line in lines if line is not None)
    return code, "\n\n".join(text for _, text in sorted(docs))
