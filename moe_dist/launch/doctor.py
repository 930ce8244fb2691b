"""What works on this machine: versions, kernels, backends, disk, and a small check that the kernels compute rightly."""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from moe_dist import __version__
from moe_dist.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: 'ok', 'note' (works, but know this) or 'bad' (will not work)."""

    name: str
    state: str
    text: str


def examine() -> Iterator[Finding]:
    """All findings, in order; each check that fails becomes a finding and never an exception."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("accelerator", _accelerator),
        ("backends", _backends),
        ("kernels", _kernels),
        ("permute", _permute),
        ("transformers", lambda: _package("transformers", "5.17", needed=True)),
        ("datasets", lambda: _package("datasets", "4.0", needed=True)),
        ("omegaconf", lambda: _package("omegaconf", "2.4", needed=True)),
        ("safetensors", lambda: _package("safetensors", "0.6", needed=True)),
        ("deepspeed", _deepspeed),
        ("wandb", lambda: _package("wandb", "0.20", needed=False)),
        ("compilers", _compilers),
        ("ranks", _ranks),
        ("disk", _disk),
    ]
    for name, check in checks:
        try:
            yield check()
        except Exception as error:
            yield Finding(name, "bad", f"{type(error).__name__}: {error}")


def _python() -> Finding:
    state = "ok" if sys.version_info >= (3, 10) else "bad"
    return Finding("python", state, f"{platform.python_version()} on {platform.platform()}; moe_dist {__version__}")


def _torch() -> Finding:
    import torch

    text = f"{torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    if _numbers(torch.__version__) < (2, 11):
        return Finding("torch", "bad", f"{text}; 2.11 or later is needed")
    return Finding("torch", "ok", text)


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        text = (
            f"torch is built for CUDA {built}, but no GPU is visible" if built else "none; everything runs on the CPU"
        )
        return Finding("accelerator", "note" if built else "ok", text)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("accelerator", "ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")


def _backends() -> Finding:
    import torch
    import torch.distributed as dist

    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    bad = not gloo or (torch.cuda.is_available() and not nccl)
    text = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in (("gloo", gloo), ("nccl", nccl)))
    return Finding("backends", "bad" if bad else "ok", text)


def _kernels() -> Finding:
    from moe_dist.ops import native

    return Finding("kernels", "ok" if native.has_cpu() else "note", native.status())


def _permute() -> Finding:
    """Forward and backward of permute and unpermute on each device, against sums written out one by one."""
    import torch

    from moe_dist.ops import backend, permute, unpermute

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            generator = torch.Generator().manual_seed(0)
            ids_TK = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(33)]).to(device)
            x_TH = torch.randn(33, 40, generator=generator).to(device, dtype).requires_grad_()
            probs_TK = torch.rand(33, 2, generator=generator).to(device).requires_grad_()
            rows_NH, plan = permute(x_TH, ids_TK, num_experts=8)
            y_TH = unpermute(rows_NH * 2, plan, probs_TK)
            y_TH.float().square().sum().backward()
            order = torch.tensor(
                [slot // 2 for expert in range(8) for slot in range(66) if ids_TK.view(-1)[slot] == expert]
            )
            if not torch.equal(rows_NH, x_TH[order.to(device)]):
                return Finding("permute", "bad", f"{backend(device)} kernels on {device} in {dtype}: rows are wrong")
            again_TH, weights_TK = x_TH.detach().float().requires_grad_(), probs_TK.detach().requires_grad_()
            (2 * again_TH * weights_TK.sum(1, keepdim=True)).square().sum().backward()
            for name, ours, wanted in (("x", x_TH, again_TH), ("probabilities", probs_TK, weights_TK)):
                error = (ours.grad.float() - wanted.grad).norm() / wanted.grad.norm()
                if not error < bound:
                    text = f"gradient of {name} is off by {error:.1e} ({backend(device)} kernels, {device}, {dtype})"
                    return Finding("permute", "bad", text)
    return Finding("permute", "ok", "right, with gradients, on " + " and ".join(f"{d} ({backend(d)})" for d in devices))


def _deepspeed() -> Finding:
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return Finding("deepspeed", "note", "not installed: one process without ZeRO works, several ranks do not")
    if _numbers(version) < (0, 19, 8):
        return Finding("deepspeed", "bad", f"{version}; 0.19.8 or later is needed")
    importlib.import_module("deepspeed")
    return Finding("deepspeed", "ok", f"{version}, imports")


def _package(name: str, least: str, *, needed: bool) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "bad" if needed else "note", "not installed" + ("" if needed else " (optional)"))
    if _numbers(version) < _numbers(least):
        return Finding(name, "bad" if needed else "note", f"{version}; {least} or later is needed")
    return Finding(name, "ok", version)


def _compilers() -> Finding:
    found = {name: shutil.which(name) for name in ("g++", "nvcc")}
    text = ", ".join(f"{name} {path or 'no'}" for name, path in found.items())
    return Finding("compilers", "ok" if found["g++"] else "note", f"{text} (needed to build the kernels, not to run)")


def _ranks() -> Finding:
    from moe_dist.launch.environment import derive

    try:
        place = derive(os.environ)
    except UserError as error:
        return Finding("ranks", "bad", str(error))
    return Finding("ranks", "ok", f"rank {place.rank} of {place.world_size}, launcher {place.launcher}")


def _disk() -> Finding:
    places = {os.getcwd(): GIB, "/dev/shm": GIB // 4}
    free = {path: shutil.disk_usage(path).free for path in places if os.path.isdir(path)}
    low = [path for path, bytes_free in free.items() if bytes_free < places[path]]
    text = ", ".join(f"{bytes_free / GIB:.1f} GiB free in {path}" for path, bytes_free in free.items())
    return Finding("disk", "note" if low else "ok", text + (f"; little in {', '.join(low)}" if low else ""))


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0); what is no number ends it."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
