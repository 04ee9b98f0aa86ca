"""What the machine is, and how busy others keep it."""

import os
import platform
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))

# Of all cores: above it others are at work, and a measurement waits.
QUIET = 0.12
LOOK_SECONDS = 2.0


def busy_seconds() -> float:
    """CPU time of all processes and the kernel since boot."""
    user, nice, system, _idle, _iowait, irq, soft, *_ = (int(x) for x in first_line("/proc/stat").split()[1:])
    return (user + nice + system + irq + soft) / TICKS


def wait_until_quiet(patience_seconds: float) -> float:
    """Waits until others use little of the machine, but not for ever; seconds waited."""
    began = time.monotonic()
    while True:
        busy, at = busy_seconds(), time.monotonic()
        time.sleep(min(LOOK_SECONDS, max(patience_seconds / 6, 0.1)))
        share = (busy_seconds() - busy) / ((time.monotonic() - at) * CORES)
        waited = time.monotonic() - began
        if share < QUIET or waited >= patience_seconds:
            return waited


def children(pid: int) -> list[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:
        pass  # gone meanwhile
    return found


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    todo, seen = [pid], []
    while todo:
        pid = todo.pop()
        seen.append(pid)
        todo += children(pid)
    return seen


def tree_cpu(pid: int | None) -> float:
    """CPU seconds of a process, its living descendants and those that they have waited for."""
    if not pid:
        return 0.0
    total = 0
    for member in tree(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(int(x) for x in fields[11:15])
        except (OSError, IndexError):
            pass  # gone meanwhile
    return total / TICKS


def memory(pids: list[int]) -> int:
    """Bytes that the processes hold: each one's own memory, and once the largest share of files and shared memory."""
    page, own, shared = os.sysconf("SC_PAGE_SIZE"), 0, 0
    for pid in pids:
        try:
            resident, mapped = (int(x) for x in Path(f"/proc/{pid}/statm").read_text().split()[1:3])
            own, shared = own + resident - mapped, max(shared, mapped)
        except (OSError, ValueError, IndexError):
            pass  # gone meanwhile
    return (own + shared) * page


def facts() -> dict:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    memory_kib = int(first_line("/proc/meminfo").split()[1])
    return {"cpu": models[0] if models else platform.machine(), "cores": CORES, "memory_bytes": memory_kib * 1024,
            "kernel": platform.release(), "architecture": platform.machine()}


def first_line(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.readline()
