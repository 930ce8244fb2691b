"""Receipts measure what they say: a tensor that was written wrong, whichever it is, stops the verb."""

from __future__ import annotations

import json

import pytest

from moe_dist.methods.nexus import parts
from moe_dist.methods.nexus.extend import extend, remove
from moe_dist.methods.nexus.stock import export
from moe_dist.methods.nexus.upcycle import upcycle
from tests.methods.nexus.test_upcycle import METHODS, config_of
from tests.methods.nexus.tiny import dense_folder

VERBS = ("paper", *METHODS, "extend", "extend linear", "remove", "qwen2_moe", "own")


def _verb(name: str, folder):
    """What writes the model `folder/out`; the models that it reads are made first."""
    out = folder / "out"
    if name in (*METHODS, "paper"):
        config = config_of(folder, router="paper") if name == "paper" else config_of(folder, method=name)
        return lambda: upcycle(config, out)
    upcycle(config_of(folder, method="linear" if name == "extend linear" else "nexus"), folder / "model")
    if name.startswith("extend"):
        dense_folder("llama", folder / "other", seed=9)
        config = config_of(folder, model=str(folder / "model"), experts={"other": str(folder / "other")})
        return lambda: extend(config, out)
    if name == "remove":
        return lambda: remove(folder / "model", "prose", out)
    return lambda: export(folder / "model", out, form=name)


@pytest.mark.parametrize("name", VERBS)
def test_no_tensor_can_be_wrong_unnoticed(tmp_path, monkeypatch, name):
    verb, real, keys = _verb(name, tmp_path), parts._value, []

    def remembered(part):
        keys.append(part.key)
        return real(part)

    def damaged(part):
        value = real(part).clone()
        if part.key == wrong:
            value.view(-1)[value.numel() // 3 :] += 0.25
        return value

    monkeypatch.setattr(parts, "_value", remembered)
    receipt = verb()
    written = json.loads((tmp_path / "out" / "nexus_receipt.json").read_text())
    assert sorted(written["tensors"]) == sorted(keys)
    assert written["checks"]
    assert all(check.error <= check.bound <= 1e-6 for check in receipt.checks)
    (tmp_path / "out").rename(tmp_path / "right")

    monkeypatch.setattr(parts, "_value", damaged)
    assert len(keys) > 10
    for wrong in [key for key in keys if ".layers.0." not in key]:
        with pytest.raises(RuntimeError, match="what was written is wrong"):
            verb()
        assert not (tmp_path / "out").exists(), wrong
    assert not list(tmp_path.glob(".building*"))
