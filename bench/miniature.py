#!/usr/bin/env python3
"""PostgreSQL's archiver and its recovery in miniature. Prints JSON: the seconds that each call took.

Like the server they start a command with %p and %f by `sh -c`, one at a time and in the data directory; what they do beside
the calls costs next to nothing.

    miniature.py archive DATA COMMAND          what is ready in archive_status, in order; .ready becomes .done
    miniature.py recover DATA COMMAND NAMES    asks for each that the file NAMES lists, in order, and removes it
    miniature.py check DATA COMMAND NAMES SOURCE    so, and each must be as it is in the folder SOURCE
"""

import filecmp
import json
import os
import sys
import time

SEGMENT = 16 << 20


def call(command: str) -> float:
    """Seconds that a command took."""
    began = time.monotonic()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    took = time.monotonic() - began
    if code:
        sys.exit(f"exit code {code}: {command}")
    return took


def archive(command: str) -> list[float]:
    status, took = "pg_wal/archive_status", []
    for name in sorted(name.removesuffix(".ready") for name in os.listdir(status) if name.endswith(".ready")):
        took.append(call(command.replace("%p", f"pg_wal/{name}").replace("%f", name)))
        os.rename(f"{status}/{name}.ready", f"{status}/{name}.done")
    return took


def recover(command: str, names: str, source: str | None = None) -> list[float]:
    path, took = "pg_wal/RECOVERYXLOG", []
    for name in open(names, encoding="ascii").read().split():
        took.append(call(command.replace("%p", path).replace("%f", name)))
        if os.stat(path).st_size != SEGMENT or source and not filecmp.cmp(path, f"{source}/{name}", shallow=False):
            sys.exit(f"{name} is not as it was")
        os.unlink(path)
    return took


if __name__ == "__main__":
    act, data, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    os.chdir(data)
    print(json.dumps({"archive": archive, "recover": recover, "check": recover}[act](*arguments)))
