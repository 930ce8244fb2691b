"""What writes: a model on this machine or behind a server, asked for batches of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; otherwise from the smallest set with probability `top_p`, and no
    other restriction (no top-k). A completion ends at the model's end of text, before any of the strings in `stop`, or
    after `max_tokens`."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For provenance and identities."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
        }


@dataclass(frozen=True)
class Completion:
    """text: up to the end mark or stop string, without it. finished: False where max_tokens cut it. tokens: generated,
    the end mark included."""

    text: str
    finished: bool
    tokens: int


class Backend(Protocol):
    """identity: what decides the completions (JSON-able): kind, model, whether equal seeds give equal texts.
    context: the most tokens of prompt and completion together, None if unknown."""

    identity: dict[str, Any]
    context: int | None

    def count(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text as a prompt, None where only the server knows."""

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        seed: int,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[Completion]:
        """A completion of each prompt, in order. `on_tokens` hears how many more tokens there are, as they come."""
