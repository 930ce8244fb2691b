"""What becomes of a gradient that is ready (`Ready`) at each ZeRO stage, and what a reduction and an update need.

As DeepSpeed 0.19.8 and `train` do it; the table is in `train.memory`.
"""

from __future__ import annotations

from moe_dist.planner.trace import Ready
from moe_dist.train.memory import FP32, Settings

PLAIN_BUCKET = 500_000_000  # elements that stage 0's and BF16_Optimizer's all-reduce takes at a time


class Gradients:
    """The gradients of one step on their way, beside what stays. `held`: bytes now."""

    def __init__(self, settings: Settings):
        self.settings, self.held = settings, 0
        self.micro_batch = -1
        self._waiting: Ready | None = None  # an oversized gradient, until the next one comes
        self._in_bucket = 0
        self._touched = FP32 * settings.owned

    def begin(self) -> None:
        """A backward begins."""
        self.micro_batch += 1
        settings = self.settings
        if settings.stage == 1 and not settings.bf16 and not self.micro_batch:
            self.held += FP32 * settings.bucket_elements
        if settings.stage == 2:
            self.held += FP32 * settings.bucket_elements

    def take(self, ready: Ready) -> int:
        """A gradient is ready: bytes that this needs for a moment beside what is then `held`, its own included."""
        settings, first = self.settings, self.micro_batch == 0
        if settings.stage == 0 or (settings.stage == 1 and not settings.bf16):
            needed = ready.bytes
            if first:
                if settings.bf16:
                    needed += FP32 * ready.elements
                self.held += FP32 * ready.elements
                return needed if settings.bf16 else 0
            return needed
        if settings.stage == 1:
            self.held += ready.bytes if first else 0
            return 0 if first else ready.bytes
        if settings.stage == 2:
            return self._bucketed(ready)
        # Stage 3 reduces in its bucket, or an oversized gradient by itself: in fp32, whole and the part that stays.
        if ready.elements <= settings.bucket_elements:
            return ready.bytes
        wide = FP32 * ready.elements if settings.bf16 else 0
        return ready.bytes + wide + FP32 * ready.elements + FP32 * ready.elements // settings.replicas[ready.family]

    def _bucketed(self, ready: Ready) -> int:
        settings, needed = self.settings, 0
        if self._waiting is not None or self._in_bucket + ready.elements > settings.bucket_elements:
            needed = self._flush()
        if ready.elements > settings.bucket_elements:
            self._waiting = ready
            self.held += ready.bytes
            return needed
        self._in_bucket += ready.elements
        return needed + ready.bytes

    def _flush(self) -> int:
        """What waits is summed: a copy of it, in bf16 one more in fp32, and only then, in fp32, the buffer for it."""
        settings, waiting = self.settings, self._waiting
        elements = waiting.elements if waiting else self._in_bucket
        if not elements:
            return 0
        own = waiting.bytes if waiting else 0
        needed = own + FP32 * elements + (own if settings.bf16 else 0)
        self._waiting, self._in_bucket = None, 0
        self.held -= own
        before = self.held
        self._partition()
        return max(needed - (self.held - before), own)

    def _partition(self) -> None:
        """The buffer that reduced gradients are kept in, made at the first reduction: of a step where it adds them up
        in fp32 itself, else of each micro-batch, to be added to the one before."""
        settings = self.settings
        wanted = 1 if settings.bf16 else min(self.micro_batch, 1) + 1
        have = getattr(self, "_partitions", 0)
        if have < wanted:
            self.held += (wanted - have) * self._touched
            self._partitions = wanted

    def end(self, *, last: bool) -> int:
        """The backward is done: bytes that what follows it needs at its worst (the reduction, after the last one)."""
        settings = self.settings
        plain = settings.stage == 0 or (settings.stage == 1 and settings.bf16)
        if plain:
            wide = FP32 * settings.totals.largest if settings.stage == 1 else 0
            return max(wide, FP32 * self._largest_reduction() if last else 0)
        if settings.stage == 1:
            if not last:
                return 0
            largest = FP32 * max(settings.totals.largest, settings.bucket_elements)
            needed = self._touched + largest
            self.held = self._touched
            return needed
        if settings.stage == 2:
            needed = self._flush()
            self._partition()
            self.held -= FP32 * settings.bucket_elements
            if not settings.bf16 and self._partitions == 2:
                self._partitions = 1
                self.held -= self._touched
            return needed
        return 0

    def _largest_reduction(self) -> int:
        trained = self.settings.totals.trained
        apart = len({self.settings.replicas[family] for family, count in trained.items() if count}) > 1
        largest = max(trained.values()) if apart else sum(trained.values())
        return min(largest, PLAIN_BUCKET + self.settings.totals.largest)

    def update(self) -> int:
        """Bytes that the optimizer's step needs at its worst."""
        settings = self.settings
        copies = settings.stage == 3 or (settings.stage in (1, 2) and not settings.bf16)
        return FP32 * settings.largest_owned_group if copies else 0
