"""Training: the loop, the engine under it, what trains and what is frozen, and what a run writes down."""
