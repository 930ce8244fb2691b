#!/usr/bin/env bash
# One GPU, or the CPU where there is none: for debugging.
#   launch/single_gpu.sh my.yaml [key=value ...]
#   GPU=3 launch/single_gpu.sh my.yaml       the fourth GPU
#   DEBUG=1 launch/single_gpu.sh my.yaml     under pdb
set -euo pipefail

python=${PYTHON:-python}
if [ -n "${GPU:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$GPU
fi
# What another launcher left in this shell would make it wait for ranks that never come.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
export PYTHONFAULTHANDLER=1

debugger=()
if [ -n "${DEBUG:-}" ]; then
    debugger=(-m pdb)
fi
exec "$python" "${debugger[@]}" -m moe_dist train "$@" parallel.world_size=1
