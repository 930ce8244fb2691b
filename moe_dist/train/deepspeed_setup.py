"""Getting DeepSpeed (written against 0.19.8) ready: its import, and the settings of an engine."""

from __future__ import annotations

import logging
import os
import warnings

import torch.distributed as dist

from moe_dist.parallel.grid import Grid


def import_deepspeed(grid: Grid):
    """DeepSpeed, ready for use: on the grid's device, quiet, on torch's process group (a group of one if there is
    none), without building its shared-memory collectives (which wants a compiler, takes half a minute and leaves files
    in /dev/shm)."""
    os.environ.setdefault("DS_ACCELERATOR", grid.device.type)
    # Without LOCAL_SIZE it starts `numactl` at every reduction of stage 3, to count the machine's "CPU devices".
    local_size = os.environ.get("LOCAL_WORLD_SIZE", str(grid.world))
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_SIZE", local_size)):
        os.environ.setdefault(name, value)
    if not dist.is_initialized():
        assert grid.world == 1
        backend = "nccl" if grid.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed
    import deepspeed.runtime.bf16_optimizer as bf16_optimizer
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    deepspeed.utils.logger.setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # prints at every group, and collects garbage
    # Stage 3 compares the numbers of modules and parameters, in the order in which they run, with those of the first
    # rank of all, at each forward until an order has come twice. Pipeline stages have others, and come to their
    # forwards at other times; and a process that has had an engine of a stage counts on from there.
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def settings(zero_stage: int, precision: str, reduce_bucket_size: int) -> dict:
    """DeepSpeed's configuration: what it is kept from doing is listed in `deepspeed_seam`."""
    zero = {
        "stage": zero_stage,
        "reduce_bucket_size": reduce_bucket_size,
        "allgather_bucket_size": 2 * -(-reduce_bucket_size // 2),
        "stage3_prefetch_bucket_size": reduce_bucket_size,
        "stage3_param_persistence_threshold": min(reduce_bucket_size, 100_000),
        # DeepSpeed would make whole MoE blocks of some families into units whose gradients it reads in a hook of the
        # block's input, which fires too early where that input needs no gradient. Ours need no such units.
        "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
    }
    in_bf16 = precision == "bf16" and zero_stage > 0
    if zero_stage in (1, 2) and not (in_bf16 and zero_stage == 1):
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": in_bf16},
        "zero_optimization": zero,
    }
