"""What locks a process down before it runs a program that nobody has read; started by `checker.py` as `python -I`.

Only the standard library, and nothing of moe_dist, so that it starts at once. In order of strength: resource limits,
Landlock (files), seccomp (network, further processes, signals, changes of files' owners and modes), and where the
kernel has not got those, an audit hook of Python's.
"""
