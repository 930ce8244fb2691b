"""How processes are started: the rank environment of every launcher, and the stages of a recipe."""
