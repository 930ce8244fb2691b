import json

import pytest

from moe_dist.cli.main import main
from moe_dist.errors import PolicyStop
from moe_dist.launch.chain import MOST_FAILURES, again, begin


def start(run, *, steps=(), checkpoint=None, leaves=None, code=1):
    """One start of a run that makes `steps`, points to a checkpoint, and leaves an exit code; what `again` says."""
    begin(run)
    assert not (run / "launch/exit").exists()
    for step in steps:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"event": "train", "step": step}) + "\n")
    if checkpoint is not None:
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints/latest").write_text(f"step-{checkpoint}\n")
    if leaves is not None:
        (run / "launch/exit").write_text(str(leaves))
    return again(run, code=code)


@pytest.mark.parametrize("own", [0, 1, 2, 87, 130])
def test_what_is_over_stays_over(tmp_path, own):
    assert start(tmp_path, steps=[1], checkpoint=1, leaves=own, code=min(own, 1)) == own


def test_success_of_rank_0_alone_is_none(tmp_path):
    assert start(tmp_path, steps=[1], leaves=0, code=137) == 1


@pytest.mark.parametrize(("own", "wanted"), [(85, 85), (86, 86), (None, 86), ("", 86)])
def test_a_run_that_got_ahead_starts_again(tmp_path, own, wanted):
    assert start(tmp_path, steps=[1, 2], leaves=own) == wanted
    assert start(tmp_path, checkpoint=4, leaves=own) == wanted  # a new checkpoint is a step, whatever the log says


@pytest.mark.parametrize("own", [85, 86, None])
def test_without_a_step_the_chain_ends(tmp_path, own):
    with pytest.raises(PolicyStop, match="no step was made since the last start"):
        start(tmp_path, leaves=own)
    assert start(tmp_path, steps=[1, 2, 3], checkpoint=2, leaves=85) == 85
    with pytest.raises(PolicyStop):  # the lines up to 3 are those of the start before
        start(tmp_path, leaves=own)
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 2}\n{"event": "data", "step": 2}\n')
    with pytest.raises(PolicyStop):  # cut to the checkpoint, and nothing after it
        start(tmp_path, leaves=own)
    assert start(tmp_path, steps=[3], leaves=own) in (85, 86)


def test_a_torn_last_line_hides_nothing(tmp_path):
    begin(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n[1]\n{"event": "tra')
    (tmp_path / "launch/exit").write_text("85")
    assert again(tmp_path, code=1) == 85


def test_failures_in_a_row_are_capped(tmp_path):
    for number in range(MOST_FAILURES):
        assert start(tmp_path, checkpoint=number + 1, leaves=86) == 86
    assert start(tmp_path, checkpoint=50, leaves=85) == 85  # a save in good order: the count starts anew
    for number in range(MOST_FAILURES):
        assert start(tmp_path, checkpoint=number + 60, leaves=86) == 86
    with pytest.raises(PolicyStop, match="4 starts in a row"):
        start(tmp_path, checkpoint=90, leaves=86)


def test_begin_takes_back_a_request_to_stop(tmp_path):
    begin(tmp_path)
    (tmp_path / "launch/stop").touch()
    begin(tmp_path)
    assert not (tmp_path / "launch/stop").exists()


def test_the_verbs(tmp_path, capsys):
    assert main(["launch", "begin", str(tmp_path)]) == 0
    assert main(["launch", "again", str(tmp_path), "--code", "1"]) == 87
    assert "no step was made" in capsys.readouterr().err
