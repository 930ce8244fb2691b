"""The streaming safetensors writer against the safetensors library, and what it costs in memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.checkpoint import CheckpointError
from moe_dist.checkpoint import tensorfile as module
from moe_dist.checkpoint.tensorfile import DTYPES, TensorFile, lay_out, write_layout


def example():
    generator = torch.Generator().manual_seed(0)
    return [
        (f"{dtype}-{size}", (10 * torch.randn(size, generator=generator)).to(dtype))
        for size in (1, 3, 1000)
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("chunk", "hand_over"), [(16 << 20, 1 << 20), (64, 1), (8, 1 << 20)])
def test_the_library_reads_what_was_streamed(tmp_path, monkeypatch, chunk, hand_over):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(module, "_HAND_OVER_BYTES", hand_over)
    path = tmp_path / "x.safetensors"
    layout = lay_out(example())
    record = write_layout(path, layout)
    data = path.read_bytes()
    assert record.size == len(data) == layout.bytes
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    read = load_file(path)
    assert set(read) == {key for key, _ in example()}
    for key, value in example():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key], value)


def test_a_slow_hash_still_sees_every_chunk_before_the_staging_buffer_is_used_again(tmp_path, monkeypatch):
    class Slow:
        def __init__(self):
            self.real = hashlib.new("sha256")

        def update(self, chunk):
            time.sleep(0.01)
            self.real.update(chunk)

        def hexdigest(self):
            return self.real.hexdigest()

    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(module, "_HAND_OVER_BYTES", 1)
    monkeypatch.setattr(module.hashlib, "sha256", Slow)
    path = tmp_path / "x"
    record = write_layout(path, lay_out([("strided", torch.arange(200.0)[::2])]))
    assert record.sha256 == hashlib.new("sha256", path.read_bytes()).hexdigest()


def test_every_tensor_is_aligned_to_its_own_size():
    layout = lay_out(example())
    position = len(layout.header)
    assert position % 8 == 0
    for tensor in layout.tensors:
        assert position % tensor.element_size() == 0
        position += tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("a", torch.zeros(2, 2))], r"a: fragments are 1-D, this one has the shape \(2, 2\)"),
        ([("a", torch.zeros(2, dtype=torch.complex64))], "cannot be stored"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(3))], "a: given twice"),
    ],
)
def test_what_cannot_be_stored_is_named(named, message):
    with pytest.raises(CheckpointError, match=message):
        lay_out(named)


def test_a_header_that_no_reader_would_take_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_MAX_HEADER_BYTES", 100)
    with pytest.raises(CheckpointError, match="3 fragments make a header of"):
        lay_out([(name, torch.zeros(1)) for name in "abc"])


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write_layout(path, lay_out([]))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def growth(work) -> int:
    """The most anonymous memory that `work` takes beyond what was there before it."""
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak[0] - start


def write_and_read(path: str, results) -> None:
    torch.set_num_threads(1)
    values = torch.ones(32 << 20)  # 128 MiB, of which a part is written without contiguity
    target = torch.zeros(values.numel() // 2)
    named = [("even", values[::2]), ("odd", values[1::2])]
    written = growth(lambda: write_layout(Path(path), lay_out(named)))

    def read():
        file = TensorFile(Path(path))
        target.copy_(file.read("odd", 0, target.numel(), dtype="F32", numel=target.numel()))

    read_bytes = growth(read)
    results.put((written, read_bytes, bool((target == 1).all())))


def test_streaming_takes_a_chunk_of_memory_and_reading_none(tmp_path):
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    process = context.Process(target=write_and_read, args=(str(tmp_path / "x"), results))
    process.start()
    written, read, right = results.get(timeout=60)
    process.join()
    assert right
    assert written <= module.CHUNK_BYTES + (4 << 20), f"{written:,} bytes"
    assert read <= 4 << 20, f"{read:,} bytes"
