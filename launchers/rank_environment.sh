# Sourced by slurm.sbatch, mpi.sh and host.sh before a rank is started: what the C library and Python read when a process starts,
# too early for the rank to set it. The values are those of overtok_megatron/environment.py, which says why; what the caller has
# set is kept.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1}
export PYTHONSAFEPATH=${PYTHONSAFEPATH:-1} # a file of the current folder must not stand in for a module of the same name
