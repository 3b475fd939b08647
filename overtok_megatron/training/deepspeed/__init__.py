"""Everything that knows DeepSpeed's internals: its optimizers, its pipeline engine, its checkpoint files.

No other file of the package imports deepspeed. Private names change without notice between releases: before another release
is allowed, each file here is compared with it, and KNOWN_RELEASE is raised together with the pins.
"""

KNOWN_RELEASE = "0.19.8"  # the release whose private names these files use
