"""Before anything is loaded: are the ranks alike, do they see one folder, does their network compute, is there room?

    facts.py        what a rank tells of itself
    compare.py      what is wrong with the facts of all ranks
    exchange.py     how they come together: by the store of the ranks, with bounded waits, not by a collective
    collectives.py  an all-reduce and an all-to-all with known results on every group
    room.py         memory, disk and time, once it is known what the model needs

Each names the rank and the host that is wrong, and what to do.
"""

from moe_dist.launch.preflight.compare import Finding
from moe_dist.launch.preflight.exchange import agree, check_collectives, compare_ranks, report
from moe_dist.launch.preflight.facts import facts_of_one
from moe_dist.launch.preflight.room import Needs, judge_room, lines_of

__all__ = [
    "Finding",
    "Needs",
    "agree",
    "check_collectives",
    "compare_ranks",
    "facts_of_one",
    "judge_room",
    "lines_of",
    "report",
]
