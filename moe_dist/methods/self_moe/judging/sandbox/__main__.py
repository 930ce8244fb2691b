"""Read a job from standard input, lock this process down, run the job's program, and say on a pipe that it ended well.

The job is JSON: source (the program), pipe (file descriptor), token (what to write there at the end), readable (files
and folders that may be read), cpu_seconds, memory_bytes, file_bytes, kernel (false: as if the kernel offered nothing).
The first line on the pipe is JSON: what is in force.
"""

import contextlib
import json
import os
import resource
import sys
import traceback
import types

import hook
import kernel
import syscalls


def main() -> int:
    kernel.die_with_parent()
    job = json.load(sys.stdin.buffer)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    here = os.getcwd()
    in_force = ["limits"]
    _limit(job)
    if job["kernel"] and kernel.restrict_files(readable=job["readable"], writable=[here]):
        in_force.append("landlock")
    kernel.drop_privileges()
    if job["kernel"] and syscalls.refuse():
        in_force.append("seccomp")
    if len(in_force) < 3:
        hook.install(here)
        in_force.append("audit hook")
    os.write(job["pipe"], json.dumps(in_force).encode() + b"\n")

    program = types.ModuleType("program")
    sys.modules["program"] = program  # dataclasses look there
    del sys.path[0]  # this folder
    try:
        exec(compile(job["source"], "<program>", "exec"), program.__dict__)
        sys.__stdout__.flush()
    except SystemExit:
        return _failed("SystemExit: the program ended before its end")
    except BaseException:
        return _failed(traceback.format_exc())
    os.write(job["pipe"], job["token"].encode())
    return 0


def _failed(why: str) -> int:
    """Say why, after all that the program has printed; where there is no room for it, the caller sees that."""
    for stream, text in ((sys.__stdout__, ""), (sys.__stderr__, f"{why}\n")):
        with contextlib.suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()
    return 1


def _limit(job: dict) -> None:
    limits = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        # SIGXCPU at the first, SIGKILL at the second.
        resource.setrlimit(name, (value, value + 1 if name == resource.RLIMIT_CPU else value))


if __name__ == "__main__":
    os._exit(main())  # without what the program has left behind: atexit, __del__
