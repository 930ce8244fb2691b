"""The numbered list: what is done to a run, and what has to hold."""

ITEMS = {
    # Checkpoints
    1: "SIGKILL of each rank at every phase of a save: the next start goes on from the newest complete step",
    2: "A torn folder of a step that is saved again is replaced; no rank fails alone",
    3: "A flipped byte, a cut, lost or swapped file: named, passed over, refused where it was asked for",
    4: "Disk full in a save: bytes needed and free, everything older intact, goes on or stops as configured",
    5: "EIO, a slow or stale file system: a bounded wait, then one error on all ranks",
    6: "`latest` lost, empty, pointing nowhere or out of the run: the folders are looked through",
    7: "A save in the background: killed before the commit, overtaken, failing in its thread",
    8: "Retention spares the last whole, the best and the pinned checkpoint, and waits for a save",
    9: "Other numbers of ranks and other placements: the same bits, each expert once, or refused before loading",
    10: "What is frozen is the base's to the bit, after training and in the export",
    # Going on exactly
    11: "N steps, or k and a resume: the same losses, weights, moments, order of data, rate",
    12: "The same with packing, across epochs, with several stops, on another number of ranks",
    13: "Other data or another configuration on resume: refused, with what differs",
    # Signals and launchers
    14: "A signal to one rank, at any time: all ranks save at the same step; a second one stops at once",
    15: "The stop file does the same under every launcher",
    16: "A signal that comes too shortly before the end for a save: a warning at the start",
    17: "Batch scripts: complete, valid, requeued on 85 and 86 only, capped, not without progress",
    18: "The ranks' environment under every launcher, and what contradicts itself",
    19: "Another number of ranks than expected, a wrong hostfile: exit 2 before anything loads",
    20: "A port that is taken; two jobs on one machine",
    # Ranks that fail
    21: "A rank raises, crashes, hangs or stops anywhere: all end in bounded time, the culprit is named",
    22: "Ranks that go different ways: no hang",
    23: "A replica that drifts: found within K steps, parameter and ranks named",
    24: "Other versions or another configuration on one rank: refused before loading",
    25: "A slow rank: reported with its host",
    # Numbers
    26: "NaN in a loss or a gradient, on one rank: skipped on all, optimizer untouched, batches named, stops by policy",
    27: "An expert without tokens: gradient exactly 0, no hang, no NaN, in every kernel",
    28: "Odd sizes: one expert gets all, top-k of all experts, one token, unaligned widths, beyond 2^31 elements",
    29: "Balance losses do not depend on padding, packing, micro-batches, ranks",
    30: "An upcycled model is the dense model at step 0; the router stays fp32",
    # Data
    31: "Corrupt records: counted and located, skipped or refused",
    32: "Two processes build one cache, one is killed: absent or complete",
    33: "Packing: neither attention nor loss crosses documents",
    34: "A chat template that is missing or another one: refused, or its hash recorded",
    # Security
    35: "Hostile YAML, and secrets in configurations: refused, or redacted wherever a config is written",
    36: "Paths and links that lead out of their folder: refused",
    37: "Pickles are never read",
    38: "Code of a model's repository runs only on demand and at a pinned revision",
    39: "A damaged safetensors file: a named error",
    40: "Shell characters in names: quoted in scripts",
    # Operation
    41: "A logger that fails: training goes on, metrics.jsonl is kept, one warning",
    42: "Not a terminal: no carriage returns, a line an interval, a small log",
    43: "A machine without GPU, and without deepspeed: help, dry runs, doctor, inspect",
}
