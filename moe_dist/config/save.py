"""The resolved configuration as a file, its hash, and what may differ when a run is resumed."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from moe_dist.config.keys import fields_of
from moe_dist.config.schema import RunConfig

REDACTED = "<redacted>"
_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_key|private_key|secret|password|passwd|credentials?|(hf|wandb|auth|access|api)_token)(_|$)"
    r"|^token$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"
)


def redact(value: Any) -> Any:
    """A copy of nested plain values with what looks like a secret, by its key or by its form, replaced."""
    if isinstance(value, dict):
        return {
            name: REDACTED if _SECRET_KEY.search(str(name)) and item not in (None, "") else redact(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return _SECRET_TEXT.sub(REDACTED, value) if isinstance(value, str) else value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, secrets redacted: for files, metrics and loggers."""
    return redact(dataclasses.asdict(config))


def write_resolved(config: RunConfig, path: str | os.PathLike) -> None:
    """Write the resolved config as YAML, complete or not at all. `load` reads it back."""
    import yaml

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    # Default style quotes what YAML 1.1 would read differently, which 1.2 reads the same.
    partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(partial, target)


def fingerprint(config: RunConfig) -> str:
    """sha256 over the keys that change what is learned (those not marked `free` in the schema)."""
    text = json.dumps(_binding(dataclasses.asdict(config)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines 'train.lr: 0.001 -> 0.0001' for binding keys that differ between two `to_dict` results."""
    old, new = _flat(_binding(before)), _flat(_binding(after))
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]


def _binding(tree: dict[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} without the keys that may change when a run is resumed."""
    kept, defaults = {}, dataclasses.asdict(RunConfig())
    for section, (kind, _) in fields_of(RunConfig).items():
        free = {name for name, (_, field) in fields_of(kind).items() if field.metadata["free"]}
        # A key that is newer than the file that was read had, in effect, its default.
        whole = {**defaults[section], **tree.get(section, {})}
        kept[section] = {name: value for name, value in whole.items() if name not in free}
    return kept


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return {place: value}
    flat: dict[str, Any] = {}
    for name, item in parts:
        flat |= _flat(item, f"{place}.{name}" if place else str(name))
    return flat
