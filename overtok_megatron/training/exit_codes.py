"""Exit codes of a run that was asked to leave before its end. This file imports no torch: the entry reads it before."""

import signal

TERMINATED = 128 + signal.SIGTERM  # asked to stop: whoever asked does not want the run to be started again by itself
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: stopped early and saved, to be started again
