"""Helpers of the tests: what several of them share. Imported as `from support.x import y`."""
