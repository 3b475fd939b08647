#!/usr/bin/env bash
# The ranks of one host, for schedulers that start one command per host, as Kubernetes does (kubernetes.yaml):
#     HOSTS=2 HOST_NUMBER=0 RANKS_PER_HOST=8 MASTER_ADDR=first-host launchers/host.sh CONFIG [section.key=value ...]
# SIGTERM and SIGUSR1 are passed on to the ranks. Leaves with the code of the first rank that fails, when all have ended.
# PYTHON names another Python than that of .venv.
set -uo pipefail
if ((100 * BASH_VERSINFO[0] + BASH_VERSINFO[1] < 501)); then # before, `wait` cannot tell which rank has ended
    echo "error: host.sh needs bash 5.1 or newer, and $BASH is $BASH_VERSION; start the ranks by torchrun" >&2
    exit 2
fi
launchers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launchers/rank_environment.sh"
: "${HOSTS:?how many hosts there are}" "${HOST_NUMBER:?0 for the host that MASTER_ADDR names}"
: "${RANKS_PER_HOST:?usually the number of GPUs}" "${MASTER_ADDR:?the name or address of host 0}"
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=$((HOSTS * RANKS_PER_HOST)) LOCAL_WORLD_SIZE=$RANKS_PER_HOST

ranks=()
trap 'kill -TERM "${ranks[@]}"' TERM
trap 'kill -USR1 "${ranks[@]}"' USR1
for ((LOCAL_RANK = 0; LOCAL_RANK < RANKS_PER_HOST; LOCAL_RANK++)); do
    export LOCAL_RANK RANK=$((HOST_NUMBER * RANKS_PER_HOST + LOCAL_RANK))
    "${PYTHON:-$launchers/../.venv/bin/python}" -m overtok_megatron.training.entry "$@" &
    ranks+=($!)
done
code=0
while ((${#ranks[@]} > 0)); do
    wait -n -p ended "${ranks[@]}"
    left=$?
    [[ -n ${ended:-} ]] || continue # a signal interrupted the waiting
    if ((code == 0)); then code=$left; fi
    alive=()
    for rank in "${ranks[@]}"; do
        if [[ $rank != "$ended" ]]; then alive+=("$rank"); fi
    done
    ranks=("${alive[@]}")
done
exit "$code"
