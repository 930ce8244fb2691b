from moe_dist.config.load import build, load
from moe_dist.config.save import REDACTED, differences, fingerprint, redact, to_dict, write_resolved


def made(*overrides):
    return build({"model": {"config": {"model_type": "qwen3_moe"}}}, overrides)


def test_secrets_are_redacted_by_key_and_by_form():
    secret = {
        "api_key": "a",
        "WANDB_API_KEY": "b",
        "token": "c",
        "hf_token": "d",
        "text": "use hf_abcdefghijklmnopqrst now",
        "url": "https://me:pass@host/x",
        "list": ["sk-abcdefghijklmnopqrst"],
    }
    shown = redact(secret)
    assert [shown[name] for name in ("api_key", "WANDB_API_KEY", "token", "hf_token")] == [REDACTED] * 4
    assert shown["text"] == f"use {REDACTED} now"
    assert shown["url"] == f"https://{REDACTED}@host/x"
    assert shown["list"] == [REDACTED]


def test_ordinary_keys_are_kept():
    ordinary = {"tokenizer": "x", "eos_token_id": 3, "num_tokens": 4, "eos_token": "<s>", "api_key": None}
    assert redact(ordinary) == ordinary


def test_resolved_file_reads_back_and_hides_secrets(tmp_path):
    config = made("logging.wandb=off", "data.train=[{corpus: stdlib}]", "model.config.api_key=hunter2", "train.lr=1e-4")
    write_resolved(config, tmp_path / "run" / "config.resolved.yaml")
    text = (tmp_path / "run" / "config.resolved.yaml").read_text()
    assert "hunter2" not in text
    again = load(tmp_path / "run" / "config.resolved.yaml")
    assert to_dict(again) == to_dict(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.resolved.yaml"]


def test_fingerprint_ignores_layout_and_sees_learning():
    base = made()
    assert fingerprint(made("parallel.zero_stage=3", "run.name=other", "train.log_every=3")) == fingerprint(base)
    assert fingerprint(made("train.lr=1")) != fingerprint(base)


def test_differences_name_the_keys():
    before, after = to_dict(made()), to_dict(made("train.lr=1", "train.betas.1=0.5", "checkpoint.every=7"))
    assert differences(before, after) == ["train.betas.1: 0.95 -> 0.5", "train.lr: 0.0001 -> 1.0"]


def test_a_run_from_before_a_key_existed_goes_on():
    before, after = to_dict(made()), to_dict(made())
    del before["train"]["nan_policy"], before["train"]["eps"], before["moe"]
    assert differences(before, after) == []
    assert differences(before, to_dict(made("train.eps=1e-6"))) == ["train.eps: 1e-08 -> 1e-06"]
