#!/usr/bin/env bash
# A training run by mpirun of OpenMPI; options of mpirun stand before `--`:
#     launchers/mpi.sh --host alpha:8,beta:8 -- CONFIG [section.key=value ...]
# Give this on the first host, in a folder that all hosts share. PYTHON names another Python than that of .venv.
set -euo pipefail
launchers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launchers/rank_environment.sh"

options=()
while (($# > 0)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
if (($# < 2)); then
    echo "usage: launchers/mpi.sh [options of mpirun] -- CONFIG [section.key=value ...]" >&2
    exit 2
fi
shift

# mpirun gives ranks on other hosts only the variables that it is told to
for name in $(compgen -e); do
    case $name in
        NCCL_* | GLOO_* | TORCH_* | PYTORCH_* | TRITON_* | CUDA_* | OMP_* | GOMP_* | MALLOC_* | THP_* | PYTHON* | DS_* | OVERTOK_* | MASTER_*)
            options+=(-x "$name") ;;
    esac
done

# The run takes as many cores as it is given: without --bind-to none mpirun binds each rank to one. A rank that is asked to
# stop has to save first: mpirun would kill it after one second.
exec mpirun --bind-to none --mca odls_base_sigkill_timeout 120 "${options[@]}" \
    "${PYTHON:-$launchers/../.venv/bin/python}" -m overtok_megatron.training.entry "$@"
