#!/usr/bin/env bash
# Several machines without a scheduler, by the deepspeed launcher and ssh (pdsh). Run it on the first of them:
#   launch/deepspeed_multinode.sh launch/hostfile my.yaml [key=value ...]
# All machines need this folder and this Python at the same path, and ssh between them without a password.
# To stop with a checkpoint: touch RUN_FOLDER/launch/stop (a signal to the launcher ends the ranks unsaved).
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: $0 HOSTFILE CONFIG.yaml [key=value ...]" >&2
    exit 2
fi
hostfile=$1
shift
python=${PYTHON:-python}

# deepspeed takes a missing hostfile for "this machine alone", and words with spaces or quotes do not survive pdsh.
if [ ! -r "$hostfile" ]; then
    echo "error: $hostfile: no such hostfile" >&2
    exit 2
fi
for word in "$@"; do
    if [[ $word =~ [^A-Za-z0-9._+=:/,@%-] ]]; then
        echo "error: '$word': over ssh only letters, digits and ._+=:/,@%- arrive whole; write it into the config" >&2
        exit 2
    fi
done
# "host slots=8", each host once: the ranks that have to come together.
ranks=$(awk -v file="$hostfile" '
    function refuse(what) { printf "error: %s:%d: %s\n", file, NR, what > "/dev/stderr"; bad = 1; exit 2 }
    /^[[:space:]]*(#|$)/ { next }
    !/^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[0-9]+[[:space:]]*$/ { refuse("not of the form HOST slots=N: " $0) }
    { slots = $2; sub(/slots=/, "", slots) }
    slots + 0 == 0 { refuse($1 " has no slots") }
    $1 in seen { refuse($1 " is there already, in line " seen[$1]) }
    { seen[$1] = NR; total += slots }
    END { if (!bad && !total) { NR = 0; printf "error: %s: names no host\n", file > "/dev/stderr"; exit 2 }; print total }
' "$hostfile")

# pdsh carries NCCL_* and PYTHON* over, and what this file says. One NAME=value a line: no comment, no empty line, no secret.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
    echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}"
    echo "TOKENIZERS_PARALLELISM=false"
    env | grep -E '^(HF_HOME|HF_HUB_OFFLINE|MOE_DIST_[A-Z_]+|TORCH_[A-Z_]+|GLOO_SOCKET_IFNAME)=[A-Za-z0-9._+=:/,@%-]+$' || true
} >"$DS_ENV_FILE"

"$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
    --module moe_dist train "$@" "parallel.world_size=$ranks"
