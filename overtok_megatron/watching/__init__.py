"""Dead and hung ranks: a thread per rank tells what it does, a watchdog per host ends the job, a supervisor starts it again.

| file | what is there |
| --- | --- |
| `rank.py` | `Watch`: what a rank does (phase, step, collective), and the thread that tells it to the host's watchdog |
| `starting.py` | the start of both in a rank, and how the watchdogs of several hosts find each other |
| `watchdog.py` | the process per host: it holds the host's ranks, reports on them, and ends them |
| `job.py` | on the first host's watchdog: which rank died or hangs, what is printed, and that the job ends |
| `hang_report.py` | which of the ranks made the others wait, and the file with all stacks |
| `links.py` | messages between these processes |
| `link_times.py` | how long they travel between hosts: a slow link is named |
| `processes.py` | states of processes, how they ended, SIGKILL |
| `clock.py` | seconds during which this process could run |
| `supervisor.py` | the launcher's process: signals passed on, and the job started again (`--max-restarts`) |

Nothing here imports torch when it is loaded: a watchdog starts in a tenth of a second and needs 20 MB.
"""
