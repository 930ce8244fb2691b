"""Entry of the command line: finds the verb, turns errors into messages and exit codes.

Only the standard library is imported here; a verb imports what it needs when it runs.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from moe_dist import __version__
from moe_dist.errors import (
    EXIT_OK,
    EXIT_POLICY,
    EXIT_TRANSIENT,
    EXIT_USER,
    HostFailure,
    PeerFailure,
    PolicyStop,
    UserError,
    is_peer_failure,
)
from moe_dist.launch.exit_file import leave_exit_code

VERBS = {
    "train": "train a model as a config file says",
    "run": "go through the stages of a recipe, each of them resumable",
    "eval": "held-out loss and perplexity of a model, domain by domain",
    "export": "write a run or a checkpoint as a Hugging Face folder",
    "inspect": "look at a run: tables, plots, and one page of them",
    "ckpt": "list and verify checkpoints",
    "prove": "a layout against one plain process, on a few layers of your own model",
    "plan": "memory, bytes on the wire and time of layouts, for 1 to 1,024 GPUs, without one",
    "preflight": "check the ranks of a run, their network and the room for it",
    "launch": "start a run under SLURM: a complete batch script from the config",
    "doctor": "check this machine and the installation",
    "esft": "train only the experts that a task uses: score, select, adapter, merge",
    "self-moe": "a base model specialises itself: generate, specialise, compose, evaluate",
    "nexus": "make one mixture of dense experts: embed, upcycle, extend, remove",
}

HELP = """\
usage: moe-dist VERB ... [key=value ...]

Distributed training of Mixture-of-Experts language models: Hugging Face in, Hugging Face out.

verbs:
{verbs}

examples:
  moe-dist doctor                                        what works on this machine
  moe-dist train configs/debug/tiny.yaml                 one process, on a GPU if there is one, else on the CPU
  moe-dist train configs/debug/tiny.yaml --dry-run       what would run, without data, weights or GPU
  moe-dist train configs/debug/tiny.yaml train.lr=1e-4   every key of the config can be overridden
  deepspeed --num_gpus 2 --module moe_dist train configs/debug/tiny.yaml parallel.expert=2
  torchrun --nproc-per-node 2 -m moe_dist train configs/debug/tiny.yaml parallel.expert=2
  moe-dist export runs/tiny exported                     a plain Hugging Face folder
  moe-dist run configs/quickstart.yaml                   train, resume, evaluate, export, sample

The same command again resumes. `moe-dist VERB --help` says more; `moe-dist train --help-keys` lists every key.
Exit codes: 0 done, 1 not proved, 2 wrong input, 85 stopped with a checkpoint saved,
86 transient failure, 87 stopped by policy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. `argv` without the program's name; sys.argv by default, of a process that
    ends with this."""
    code = EXIT_USER
    leave = _leave if argv is None else leave_exit_code
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        _say(f"error: {error}")
    except PolicyStop as error:
        _say(f"stopped: {error}")
        code = EXIT_POLICY
    except PeerFailure as error:
        _say(f"ended, since another rank failed: {error}")
        code = EXIT_TRANSIENT
    except HostFailure as error:
        _say(f"error: {error}")
        code = EXIT_TRANSIENT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader, `head` say, has what it wanted
        code = EXIT_OK
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            code = 1
            leave(code)
            raise
        place = f" at {error.filename}" if error.filename else ""
        _say(f"error: no disk space left{place}: free some, then start the same command again")
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else EXIT_USER
    except Exception as error:
        code = EXIT_TRANSIENT if is_peer_failure(error) else 1
        if code == 1:
            leave(code)
            raise
        traceback.print_exc()
        _say("another rank or the network failed: start the same command again to continue")
    leave(code)
    return code


def _main(argv: list[str]) -> int:
    argv, local_rank = take_local_rank(argv)
    if argv and argv[0] in ("--version", "-V"):
        print(f"moe_dist {__version__}")
        return EXIT_OK
    if not argv or argv[0] in ("--help", "-h", "help"):
        width = max(map(len, VERBS))
        print(HELP.format(verbs="\n".join(f"  {verb:<{width}} {line}" for verb, line in VERBS.items())))
        return EXIT_OK if argv else EXIT_USER
    verb, words = _known(argv[0], VERBS), argv[1:]
    package = f"moe_dist.cli.{verb.replace('-', '_')}"
    module = importlib.import_module(package)
    if hasattr(module, "VERBS"):  # a group of verbs, each a module of that package
        if not words or words[0] in ("--help", "-h"):
            width = max(map(len, module.VERBS))
            lines = "\n".join(f"  {name:<{width}} {line}" for name, line in module.VERBS.items())
            print(f"usage: moe-dist {verb} VERB ...\n\n{module.__doc__}\nverbs:\n{lines}")
            return EXIT_OK if words else EXIT_USER
        name = _known(words[0], module.VERBS, before=f"{verb} ")
        module = importlib.import_module(f"{package}.{name}")
        verb, words = f"{verb} {name}", words[1:]
    parser = _Parser(
        prog=f"moe-dist {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(words)
    args.local_rank = local_rank
    return module.run(args)


def _known(verb: str, verbs: dict[str, str], *, before: str = "") -> str:
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {before}{near[0]}?" if near else f"there is {', '.join(before + name for name in verbs)}"
        raise UserError(f"unknown verb {before + verb!r}: {hint}")
    return verb


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as all others are reported."""

    def error(self, message: str):
        if "unrecognized arguments" in message:
            message += " (values of the config go without dashes, as in train.lr=1e-4)"
        raise UserError(f"{message}; `{self.prog} --help` says more")


def _leave(code: int) -> None:
    """Leave the exit code; and where this is one of several ranks, end here and now.

    What is torn down after a run (groups, their threads, those of other libraries) may wait for ranks that are lost,
    and a thread that wants the interpreter while that ends can abort a process whose run was done.
    """
    leave_exit_code(code)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a stream that is closed
            stream.flush()
    os._exit(code)


def take_local_rank(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """(argv without --local_rank or --local-rank, wherever a launcher put it; its value or None)."""
    rest, value = [], None
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            rest.append(word)
            continue
        text = text if equals else next(words, "")
        if not text.isdecimal():
            raise UserError(f"{name}={text}: has to be a whole number")
        value = int(text)
    return rest, value


def _say(message: str) -> None:
    """One message on stderr; ranks other than 0 say who they are."""
    rank = os.environ.get("RANK", "0")
    print(f"moe-dist: {message}" if rank == "0" else f"moe-dist [rank {rank}]: {message}", file=sys.stderr, flush=True)
