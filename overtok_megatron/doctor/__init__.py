"""`overtok doctor`: are all hosts alike, do they see the same run, and how fast are the links between them.

rank.py is the program of each rank. It meets the others over a store (meeting.py), tells what its host is (facts.py,
interfaces.py) and what it reads of the run (run_facts.py), and measures links in a process of its own (prober.py, probing.py)
in the order of rounds.py. The first rank compares (findings.py, links.py) and writes the report (report.py). starting.py
starts the ranks here (one_host.py), or over ssh on the hosts of a file (remote.py).
"""
