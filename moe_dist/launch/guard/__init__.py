"""What makes all ranks end when one does, and says which one it was and of what.

Beside each rank runs a small process, its *watcher*: it needs neither torch nor the rank's interpreter, so it works on
while that holds the GIL, is stopped, or is gone. The watchers talk to a *hub*, in the watcher of rank 0, which knows
where each rank is (`beat`), finds the first culprit (`judge`) and tells all of them to end.

    rank N ──memory: step, phase──▶ watcher N ──TCP──▶ hub ──▶ "rank 3 on n2 was killed" ──▶ watchers ──▶ their ranks

Nothing here asks a rank to wait for another: a beat is a few bytes written to memory.
"""

from moe_dist.launch.guard.rank import NO_GUARD, Guard, guarded

__all__ = ["NO_GUARD", "Guard", "guarded"]
