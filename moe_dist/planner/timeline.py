"""The most bytes that a rank holds at any time in a step: segments of a trace, put together in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.planner.gradients import Gradients
from moe_dist.planner.trace import EMPTY, Segment, Trace
from moe_dist.train.memory import EMBEDDING, HEAD, Inventory, Settings

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
    gathered = Gathered(course, weights, settings)
    # From the second micro-batch to the last one nothing changes but how many are still to come.
    steps = sorted({0, min(1, micro_batches - 1), micro_batches - 1})
    for index in steps:
        kept = follow.kept
        # The others in flight: their forwards have run, and their backwards have not.
        follow.kept += (min(in_flight, micro_batches - index) - 1) * sum(_end(segment) for *_, segment in forward)
        for name, place, segment in forward:
            follow.run(segment, gathered.at(place, backward=False), f"forward, {name}")
        follow.gradients.begin()
        for name, place, segment in backward:
            follow.run(segment, gathered.at(place, backward=True), f"backward, {name}")
        follow.kept = kept
        needed = follow.gradients.end(last=index == micro_batches - 1)
        follow.see(needed, gathered.standing, "reduction")
    follow.see(follow.gradients.update(), gathered.standing, "update")
    return follow.best


def _segments(trace: Trace, course: Course) -> tuple[list, list]:
    """(name, place among the parts that have weights, segment), in the order of the run."""
    forward: list[tuple[str | int, int | None, Segment]] = [("before", None, trace.forward["before"])]
    backward: list[tuple[str | int, int | None, Segment]] = []
    if course.first:
        forward.insert(0, (EMBEDDING, 0, trace.forward.get(EMBEDDING, EMPTY)))
        backward.append((EMBEDDING, 0, trace.backward.get(EMBEDDING, EMPTY)))
    for place, layer in enumerate(course.layers, int(course.first)):
        forward.append((layer, place, trace.forward[layer]))
        backward.append((layer, place, trace.backward.get(layer, EMPTY)))
    if course.last:
        place = course.first + len(course.layers)
        forward += [(HEAD, place, trace.forward["head"]), ("loss", place, trace.forward["loss"])]
        backward.append((HEAD, place, trace.backward.get("head", EMPTY)))
    return forward, backward[::-1]


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


class Gathered:
    """ZeRO 3: weights that are whole for the moment. A module's are gathered before it runs, with those of the next
    ones up to a bucket, and let go after it unless they are wanted again within `LIVE_ELEMENTS`, which are those of the
    last layers of the forward, since the backward begins with them. Small ones always stay whole.

    whole: elements of each part that are gathered; small: those that stay; both by family."""

    def __init__(self, course: Course, weights: Inventory, settings: Settings):
        self.element = settings.element
        order = [*([EMBEDDING] if course.first else []), *course.layers, *([HEAD] if course.last else [])]
        self.active = settings.stage == 3
        self.threshold = min(settings.bucket_elements, PERSISTENT)
        self.prefetch = settings.bucket_elements
        self.parts: list[tuple[str | int, Counter, Counter]] = []
        for part in order if self.active else ():
            whole, small = Counter(), Counter()
            for weight in weights.get(part, ()):
                if settings.replicas[weight.family] > 1:
                    (small if weight.elements <= self.threshold else whole)[weight.family] += weight.elements
            self.parts.append((part, whole, small))
        self.standing = self.element * sum(small.total() for _, _, small in self.parts)
        sizes = [whole.total() for _, whole, _ in self.parts]
        self.after = [sum(sizes[index + 1 :]) for index in range(len(sizes))]

    def again(self, index: int) -> bool:
        """Whether the part at that place is let go after its forward, and gathered once more in the backward."""
        return 2 * self.after[index] > LIVE_ELEMENTS

    def at(self, index: int | None, *, backward: bool) -> int:
        """Bytes while the part at that place runs; None: what comes before all of them."""
        if not self.active or index is None:
            return self.standing
        kept = self.parts[index][1].total()
        others = sum(whole.total() for place, (_, whole, _) in enumerate(self.parts[:index]) if not self.again(place))
        ahead = sum(whole.total() for _, whole, _ in self.parts[:index]) - others if backward else self.after[index]
        return self.standing + self.element * (kept + others + min(self.prefetch, ahead))
