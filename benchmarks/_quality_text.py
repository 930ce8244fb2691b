"""Text of the experiments on quality: real documents that a machine holds, byte by byte, as named domains.

  python_code, prose, docstrings   the standard library and Python's own help: `moe_dist.data.corpora`
  c, perl                          system headers, the Perl modules
  de, fr, sv, en                   manual pages in German, French, Swedish, and of the English sections 5 to 8
  cmake                            modules of CMake
  zh                               Chinese instructions of the ESFT repository, where they lie beside the checkout

Some documents of each domain are held out; they depend on names alone. Documents end with a zero byte.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.data.corpora import prepare_quickstart
from moe_dist.errors import UserError

INSTRUCTIONS = Path(__file__).parents[2] / "shared" / "data" / "esft"
SOURCES = {  # of each domain: folders, and the files that count in them
    "c": (("/usr/include", "*.h"), ("/usr/include/linux", "*.h")),
    "perl": (("/usr/share/perl", "5.*.*/**/*.pm"),),
    "de": (("/usr/share/man/de", "man?/*.gz"),),
    "fr": (("/usr/share/man/fr", "man?/*.gz"),),
    "sv": (("/usr/share/man/sv", "man?/*.gz"),),
    "en": (("/usr/share/man", "man[5-8]/*.gz"),),
    "cmake": (("/usr/share", "cmake-*/**/*.cmake"),),
    "zh": ((str(INSTRUCTIONS), "*_train.jsonl"),),
}
BASE = ("python_code", "c", "perl", "de", "prose", "zh", "docstrings")  # the base learns the first six there are
TARGETS = ("fr", "de", "zh", "perl", "c", "docstrings")  # the task is the first of these
LONGEST = 1 / 50  # of a domain: longer documents are cut, so that no single file is most of it
HELD_OUT = 0.07
SMALLEST = 1 / 8, 1 / 100  # of a domain's size, training and held out: with less text a domain is left out


@dataclass(frozen=True)
class Domain:
    """Bytes of the documents that train and of those held out, uint8 `[N]`."""

    train: torch.Tensor
    held_out: torch.Tensor

    def is_whole(self, limit: int) -> bool:
        train, held_out = SMALLEST
        return len(self.train) >= train * limit and len(self.held_out) >= held_out * limit

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.train.numpy().tobytes() + self.held_out.numpy().tobytes()).hexdigest()[:16]


def load_domains(cache: Path, *, megabytes: float) -> tuple[str, dict[str, Domain]]:
    """(name of the task, the domains: first the task, then those of the base), each of at most `megabytes`.

    cache: a folder for the corpora that are made from the standard library.
    """
    domains = whole_domains(cache, {*BASE, *TARGETS}, megabytes=megabytes)
    task = next((name for name in TARGETS if name in domains), None)
    if task is None:
        raise UserError(f"no domain of text for the task on this machine; looked for {', '.join(TARGETS)}")
    base = [name for name in BASE if name in domains and name != task][:6]
    return task, {name: domains[name] for name in (task, *base)}


def whole_domains(cache: Path, names: Collection[str], *, megabytes: float) -> dict[str, Domain]:
    """Those of the named domains of which this machine has enough text, each of at most `megabytes`."""
    limit = int(1e6 * megabytes)
    domains = {}
    for name in SOURCES.keys() & names:
        domains[name] = _collect(sorted(_files_of(name), key=lambda item: _draw(item[0])), limit)
    manifest = prepare_quickstart(cache / "corpora", megabytes=3 * megabytes, vocab_size=None)
    for name, splits in manifest["domains"].items():
        texts = [_lines(cache / "corpora" / splits[split]["file"], limit) for split in ("train", "eval")]
        domains[name] = Domain(*texts)
    return {name: domain for name, domain in domains.items() if name in names and domain.is_whole(limit)}


def windows(stream_N: torch.Tensor, starts_B: torch.Tensor, length: int) -> torch.Tensor:
    """The windows of `length` bytes that begin at `starts_B`, as int64 `[B,L]`."""
    return stream_N[starts_B[:, None] + torch.arange(length)].long()


def spaced(stream_N: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` windows spread evenly over a stream, int64 `[B,L]`; they do not overlap where there is room."""
    return windows(stream_N, torch.linspace(0, len(stream_N) - length, count).long(), length)


def _files_of(domain: str) -> Iterator[tuple[str, Path]]:
    for folder, pattern in SOURCES[domain]:
        for path in Path(folder).glob(pattern):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix(), path


def _collect(files: list[tuple[str, Path]], limit: int) -> Domain:
    parts, size = {True: [], False: []}, 0
    documents = ((f"{name}/{number}", text) for name, path in files for number, text in enumerate(_documents(path)))
    for name, text in documents:
        data = text.encode("utf-8")[: int(LONGEST * limit)] + b"\0"
        parts[_draw(name) < HELD_OUT].append(data)
        size += len(data)
        if size >= limit:
            break
    return Domain(_bytes(parts[False]), _bytes(parts[True]))


def _documents(path: Path) -> Iterator[str]:
    """Documents of a file: a manual page from its title on without remarks, the messages of each line, or all of it."""
    if path.suffix == ".jsonl":
        for line in path.read_text("utf-8").splitlines():
            yield "\n".join(message["content"] for message in json.loads(line)["messages"])
    elif path.suffix == ".gz":
        page = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        _, title, rest = page.partition("\n.TH ")
        kept = [line for line in (rest if title else page).split("\n") if not line.startswith(('.\\"', "'\\\"", ".IX"))]
        yield "\n".join(kept)
    else:
        yield path.read_text("utf-8", errors="replace")


def _lines(file: Path, limit: int) -> torch.Tensor:
    texts = [json.loads(line)["text"].encode("utf-8") for line in file.read_text("utf-8").splitlines()]
    return _bytes([text[: int(LONGEST * limit)] + b"\0" for text in texts])[:limit]


def _bytes(parts: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") / 2**64
