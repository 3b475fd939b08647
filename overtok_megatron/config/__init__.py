"""A run's configuration: schema, strict loading, rules across fields, and what is derived from it. Starts no process."""
