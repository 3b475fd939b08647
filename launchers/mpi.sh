#!/usr/bin/env bash
# A training run by mpirun of OpenMPI; options of mpirun stand before `--`:
#     launchers/mpi.sh --host alpha:8,beta:8 -- CONFIG [section.key=value ...]
# SIGUSR1 and SIGTERM to this script make the ranks save and leave; it then leaves with 75 or 143.
# Give this on the first host, in a folder that all hosts share. PYTHON names another Python than that of .venv.
set -uo pipefail
launchers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$launchers/../.venv/bin/python}
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
travelling='import os; from overtok_megatron.environment import travelling; print(*travelling(os.environ))'
for name in $("$python" -c "$travelling") MASTER_ADDR MASTER_PORT; do
    if [[ -v $name ]]; then options+=(-x "$name"); fi
done

# Without --bind-to none mpirun binds each rank to one core.
mpirun --bind-to none "${options[@]}" "$python" -m overtok_megatron.training.entry "$@" &
mpirun=$! code=0 asked=''
# mpirun passes SIGUSR1 on to all ranks. After a SIGTERM it gives them one second, in which they cannot save.
trap 'kill -USR1 "$mpirun"' USR1
trap 'asked=143; kill -USR1 "$mpirun"' TERM
while true; do
    wait "$mpirun" # a signal that is trapped interrupts it
    code=$?
    kill -0 "$mpirun" 2>/dev/null || break
done
if [[ $code == 75 && -n $asked ]]; then code=$asked; fi
exit "$code"
