"""Curves and tables made of the records of runs."""
