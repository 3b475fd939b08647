"""`ssh` and `pdsh` that know hosts by any name, all of them this machine, and a host `dead` that is not reached."""

import os
from pathlib import Path

# As ssh: options and the host in front of the command, nothing of the caller's environment, a shell. One host has no package.
SSH = """#!/bin/sh
while [ $# -gt 0 ]; do case "$1" in -o) shift 2 ;; -*) shift ;; *) break ;; esac; done
host=$1; shift
[ "$host" = dead ] && { echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255; }
[ "$host" = bare ] && { echo "sh: 1: python: not found" >&2; exit 127; }
exec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""
# As pdsh -S: the words joined, %n replaced by the number of the host and %% by %, lines with the host in front, the worst code.
PDSH = """#!/usr/bin/env python3
import re, subprocess, sys, threading
words = sys.argv[1:]
assert words[:2] == ["-S", "-f"] and words[3] == "-w", words
hosts, command = words[4].split(","), " ".join(words[5:])
codes = []
def run(number, host):
    text = re.sub("%(.)", lambda found: {"n": str(number), "%": "%"}[found[1]], command)
    process = subprocess.Popen(["ssh", host, text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(f"{host}: {line}", end="", flush=True)
    codes.append(process.wait())
threads = [threading.Thread(target=run, args=pair) for pair in enumerate(hosts)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(max(codes))
"""


def with_fake_hosts(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment with both programs first in PATH; they are written into `folder`."""
    folder.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return environment | {"PATH": f"{folder}{os.pathsep}{environment['PATH']}"}
