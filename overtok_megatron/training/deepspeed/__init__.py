"""Everything that knows DeepSpeed's internals: its optimizers, its pipeline engine, its checkpoint files."""
