"""Generation that is cut short: killed, asked to stop, or without its server on one rank. It goes on as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from moe_dist.methods.self_moe.generation.local_model import LocalModel
from tests.methods.self_moe.generation.test_generate import bytes_of, run

pytestmark = pytest.mark.usefixtures("one_thread")


def _with_a_failure(config: str, out: str) -> str:
    """Rank 1 fails at its second batch. What this rank says at the end."""
    calls, complete = [], LocalModel.complete

    def failing(self, *args, **options):
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 2:
            raise UserError("the server is gone")
        time.sleep(0.1)
        return complete(self, *args, **options)

    LocalModel.complete = failing
    try:
        run(Path(config), Path(out))
    except UserError as error:
        return str(error)
    finally:
        LocalModel.complete = complete
    return "done"


def test_a_failure_on_one_rank_ends_all_with_its_message(generation, tmp_path, ranks):
    config = generation(batch_size=2)
    assert ranks(2, _with_a_failure, str(config), str(tmp_path / "out"), timeout=120) == ["the server is gone"] * 2
    assert list((tmp_path / "out" / ".parts").rglob("*.json"))
    assert run(config, tmp_path / "out") == EXIT_OK
    assert run(config, tmp_path / "plain") == EXIT_OK
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "plain")


KILLED = """
import os, signal, sys
from pathlib import Path
from moe_dist.methods.self_moe.generation.parts import Parts
from tests.methods.self_moe.generation.test_generate import run
import torch
torch.set_num_threads(1)
write, left = Parts.write, [5]
def last(self, batch, part):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, batch, part)
Parts.write = last
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_and_loses_the_batch_in_flight_alone(generation, tmp_path, batches):
    config = generation()
    assert run(config, tmp_path / "whole") == EXIT_OK
    total = len(batches)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, config, tmp_path / "out"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".parts"]
    stored = list((tmp_path / "out" / ".parts").rglob("*.json"))
    assert len(stored) == 4
    stored[0].write_text(stored[0].read_text()[:-30])  # a damaged part is generated again
    batches.clear()
    assert run(config, tmp_path / "out") == EXIT_OK
    assert len(batches) == total - 3
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    batches.clear()
    assert run(config, tmp_path / "out") == EXIT_OK  # nothing is left to be done
    assert not batches


def test_a_run_that_is_asked_to_stop_goes_on(generation, tmp_path, monkeypatch, batches):
    config, complete = generation(), LocalModel.complete

    def interrupted(self, *args, **options):
        done = complete(self, *args, **options)
        if len(batches) == 3:
            signal.raise_signal(signal.SIGTERM)
        return done

    monkeypatch.setattr(LocalModel, "complete", interrupted)
    lines = []
    assert run(config, tmp_path / "out", say=lines.append) == EXIT_PREEMPTED
    assert len(list((tmp_path / "out" / ".parts").rglob("*.json"))) == 3  # what was begun is stored
    assert "goes on" in lines[-1]
    assert run(config, tmp_path / "out") == EXIT_OK
    assert run(config, tmp_path / "whole") == EXIT_OK
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
