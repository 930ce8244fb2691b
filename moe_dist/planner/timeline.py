"""The most bytes that a rank holds at any time in a step: segments of a trace, put together in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.planner.inventory import EMBEDDING, HEAD, Inventory
from moe_dist.planner.trace import EMPTY, Segment, Trace
from moe_dist.planner.zero import Gradients, Settings

LIVE_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters and stage3_max_reuse_distance, as DeepSpeed has them
PERSISTENT = 100_000  # stage3_param_persistence_threshold at most, see train/deepspeed_setup.py


@dataclass(frozen=True)
class Peak:
    """The parts of the most bytes alive. Those after `moments` as they are at that moment, `where` it is.

    gradients: those of the step, whole or a share. activations: what forwards have kept. working: what a layer, a
    reduction or the update needs for a moment. buffers: ZeRO's, and the weights that stage 3 has gathered.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    working: int
    buffers: int
    where: str

    @property
    def total(self) -> int:
        return sum(value for name, value in vars(self).items() if name != "where")


@dataclass(frozen=True)
class Course:
    """The parts of a stage's model in their order. layers: of each of its decoder layers, the index in the trace."""

    layers: Sequence[int]
    first: bool = True
    last: bool = True


def peak(
    trace: Trace, course: Course, weights: Inventory, settings: Settings, *, micro_batches: int, in_flight: int = 1
):
    """Follow a step's micro-batches. in_flight: of how many a pipeline stage keeps activations at once (1F1B)."""
    follow = _Follow(settings)
    forward, backward = _segments(trace, course)
    gathered = _gathered(course, weights, settings)
    # From the second micro-batch to the last one nothing changes but how many are still to come.
    steps = sorted({0, min(1, micro_batches - 1), micro_batches - 1})
    for index in steps:
        kept = follow.kept
        # The others in flight: their forwards have run, and their backwards have not.
        follow.kept += (min(in_flight, micro_batches - index) - 1) * sum(_end(segment) for _, segment in forward)
        for name, segment in forward:
            follow.run(segment, gathered.at(name, backward=False), f"forward, {name}")
        follow.gradients.begin()
        for name, segment in backward:
            follow.run(segment, gathered.at(name, backward=True), f"backward, {name}")
        follow.kept = kept
        needed = follow.gradients.end(last=index == micro_batches - 1)
        follow.see(needed, gathered.standing, "reduction")
    follow.see(follow.gradients.update(), gathered.standing, "update")
    return follow.best


def _segments(trace: Trace, course: Course) -> tuple[list, list]:
    forward: list[tuple[str, Segment]] = [(EMBEDDING, trace.forward.get(EMBEDDING, EMPTY))] if course.first else []
    forward.append(("before", trace.forward["before"]))
    backward: list[tuple[str, Segment]] = []
    for layer in course.layers:
        forward.append((layer, trace.forward[layer]))
        backward.append((layer, trace.backward.get(layer, EMPTY)))
    backward.reverse()
    if course.last:
        forward += [(HEAD, trace.forward["head"]), ("loss", trace.forward["loss"])]
        backward.insert(0, (HEAD, trace.backward.get("head", EMPTY)))
    if course.first:
        backward.append((EMBEDDING, trace.backward.get(EMBEDDING, EMPTY)))
    return forward, backward


def _end(segment: Segment) -> int:
    return segment[-1].end if segment else 0


class _Follow:
    def __init__(self, settings: Settings):
        self.settings, self.resident = settings, settings.resident
        self.gradients = Gradients(settings)
        self.kept = self.most = 0
        self.best: Peak | None = None

    def run(self, segment: Segment, gathered: int, where: str) -> None:
        for stretch in segment:
            self.see(stretch.peak, gathered, where)
            if stretch.ready is not None:
                self.see(stretch.end + self.gradients.take(stretch.ready), gathered, where)
        self.kept += _end(segment)

    def see(self, working: int, gathered: int, where: str) -> None:
        now = self.resident + self.gradients.held + self.kept + working + gathered
        if now > self.most:
            self.most, settings = now, self.settings
            self.best = Peak(
                weights=settings.weights,
                masters=settings.masters,
                moments=settings.moments,
                gradients=settings.standing_gradients + self.gradients.held,
                activations=self.kept,
                working=working,
                buffers=settings.standing_buffers + gathered,
                where=where,
            )


class _gathered:
    """ZeRO 3: weights that are whole for the moment. A module's are gathered before it runs, with those of the next
    ones up to a bucket, and let go after it unless they are wanted again within `LIVE_ELEMENTS`, which are those of the
    last layers of the forward, since the backward begins with them."""

    def __init__(self, course: Course, weights: Inventory, settings: Settings):
        self.element = settings.element
        self.active = settings.stage == 3
        if not self.active:
            self.standing = 0
            return
        order = [*([EMBEDDING] if course.first else []), *course.layers, *([HEAD] if course.last else [])]
        threshold = min(settings.bucket_elements, PERSISTENT)
        apart = {family for family, count in settings.replicas.items() if count > 1}
        self.whole, standing = {}, 0
        for part in order:
            mine = [weight for weight in weights.get(part, ()) if weight.family in apart]
            small = sum(weight.elements for weight in mine if weight.elements <= threshold)
            standing += small
            self.whole[part] = sum(weight.elements for weight in mine) - small
        self.standing = self.element * standing
        self.after, total = {}, 0
        for part in reversed(order):
            self.after[part] = total
            total += self.whole[part]
        self.order = order
        self.prefetch = settings.bucket_elements

    def at(self, part: str | int, *, backward: bool) -> int:
        if not self.active:
            return 0
        part = HEAD if part == "loss" else part
        if part not in self.whole:
            return self.standing
        # Of what lies behind this part's own weights, in the direction of the run, elements that are still wanted.
        if backward:
            before = sum(self.whole.values()) - self.after[part] - self.whole[part]
            kept = min(before, max(LIVE_ELEMENTS // 2 - self.after[part], self.prefetch))
        else:
            before = 0
            for other in self.order[: self.order.index(part)]:
                # Wanted again after everything that comes behind it, there and back.
                if 2 * self.after[other] <= LIVE_ELEMENTS:
                    before += self.whole[other]
            kept = before + min(self.prefetch, self.after[part])
        return self.standing + self.element * (self.whole[part] + max(kept, 0))
