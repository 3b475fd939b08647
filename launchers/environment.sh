# Sourced by the other launchers: makes the virtual environment .venv once, with pinned packages, and activates it.
# Where there is no GPU, a CPU build of torch is installed, which launchers/constraints.txt pins. On a GPU machine the driver
# decides which torch can run: the newest is installed unless TORCH names another, as in TORCH='torch==2.11.0'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version) is too old; set PYTHON to a Python of version 3.11 or newer" >&2
    exit 2
fi

install_extra() { # the package with one of its extras, once
    local extra=$1 mark=.venv/installed-$1
    if [[ -f $mark && $mark -nt pyproject.toml && $mark -nt launchers/constraints.txt ]]; then
        if [[ -z ${TORCH:-} || $TORCH == "$(<"$mark")" ]]; then # the torch that was asked for is there
            return
        fi
    fi
    echo "installing (${extra}) into .venv ..."
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        .venv/bin/pip install --quiet --disable-pip-version-check "${TORCH:-torch>=2.11}"
        # all pins but torch's; DeepSpeed's matters most: we wrap methods of its optimizers, which another release may change
        grep -v '^torch==' launchers/constraints.txt >.venv/constraints-gpu.txt
        .venv/bin/pip install --quiet --disable-pip-version-check --constraint .venv/constraints-gpu.txt --editable ".[$extra]"
        if ! .venv/bin/python -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
            echo "warning: torch $(.venv/bin/python -c 'import torch; print(torch.__version__)') sees no GPU, though nvidia-smi" \
                "does, so everything will run on the CPU; for an older driver set TORCH='torch==2.11.0' (and PIP_INDEX_URL)" >&2
        fi
    else
        # torch first and by its pin: any looser request may bring gigabytes of CUDA packages
        .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' launchers/constraints.txt)"
        .venv/bin/pip install --quiet --disable-pip-version-check --constraint launchers/constraints.txt --editable ".[$extra]"
    fi
    echo "${TORCH:-}" >"$mark"
}
