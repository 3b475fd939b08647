"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("shared", deadline=None)  # a busy machine is no failure; pytest-timeout ends what hangs
settings.load_profile("shared")
