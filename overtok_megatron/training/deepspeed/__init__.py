"""Everything that knows DeepSpeed's internals: its optimizers, its pipeline engine, its checkpoint files.

No other file of the package imports deepspeed. Two know names of it without: checkpoint/deepspeed_state.py reads the format of
its files, parallel/splits.py sets the marks that its norms look for. Private names change without notice between releases:
before another release is allowed, each file here is compared with it, and KNOWN_RELEASE is raised together with the pins.
"""

KNOWN_RELEASE = "0.19.8"  # the release whose private names these files use
