"""Grids of runs: what a study asks, the runs that answer it, and their tables and pictures."""
