"""Signals only set a flag."""

from __future__ import annotations

import os
import signal

import pytest

from moe_dist.train.stop import SIGNALS, StopFlag


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_immediate():
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_signals_have_to_insist(monkeypatch):
    """Cancelling a job sends several at once; only the same one again, later, means now."""
    with StopFlag() as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop.requested
        monkeypatch.setattr("moe_dist.train.stop.INSIST", 0.0)
        with pytest.raises(KeyboardInterrupt, match="a second SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_hangup_is_left_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_flag_inside_of_another_knows_what_that_one_was_asked():
    with StopFlag() as outer:
        with StopFlag() as inner:
            assert not inner.requested
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.requested
        assert not outer.requested
        os.kill(os.getpid(), signal.SIGTERM)
        with StopFlag() as later:
            assert later.requested


def test_a_file_asks_as_well(tmp_path):
    with StopFlag(tmp_path / "stop") as stop:
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert stop.requested
