"""Runs one command and says what it cost: time until its result is durable, CPU, memory, and how quiet it was meanwhile.

Linux only: it makes itself the reaper of orphans for the time of the command, so that the CPU of processes which the
command leaves behind is counted too.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import machine
from place import LIMIT_SECONDS, BenchError, Place

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# A sample is disturbed if others used more than this of all cores meanwhile.
DISTURBED = 0.15

MEMORY_EVERY_SECONDS = 0.05


@dataclass
class Sample:
    """One measured run. Times in seconds, sizes in bytes."""

    wall: float  # until the result is durable
    unsynced: float  # part of `wall`: what the command left to fsync
    cpu: float  # of everything on its behalf: the three that follow
    cpu_command: float
    cpu_service: float  # a daemon that runs anyway
    cpu_server: float  # PostgreSQL with its archive_command
    memory: int  # peak of the command's processes and the daemon together
    foreign: float  # share of all cores that others used
    waited: float  # for a quiet machine, before
    stored: int = 0
    requests: int | None = None  # to the store, if the command's JSON says so
    latency: float | None = None  # that 99 of 100 transactions of a load had at most

    @property
    def clean(self) -> bool:
        return self.foreign < DISTURBED

    def document(self) -> dict:
        return {**asdict(self), "clean": self.clean}


class MemoryWatch:
    """Samples the memory of the descendants of this process and of a service; a thread."""

    def __init__(self, service: int | None):
        self.service, self.peak, self.stop = service, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def watch(self):
        own = os.getpid()
        while not self.stop.wait(MEMORY_EVERY_SECONDS):
            pids = set(machine.tree(own)) - {own}
            if self.service:
                pids.add(self.service)
            self.peak = max(self.peak, machine.memory(sorted(pids)))


def timed(place: Place, name: str, command: list, result: Path | None, service: int | None = None,
          server: int | None = None, store: int | None = None, load: int | None = None) -> Sample:
    """Runs a command whose result is the folder `result`; without one it promises nothing durable.

    `store` is an object store here and `load` what keeps the server busy: their work is nobody's."""
    os.sync()
    waited = 0.0 if load else machine.wait_until_quiet(place.sizes.patience_seconds)
    log_path, output_path = place.logs / f"{name}.log", place.logs / f"{name}.out"

    def usage() -> tuple:
        return machine.busy_seconds(), *(machine.tree_cpu(pid) for pid in (service, server, store, load)), own_cpu()

    before = usage()
    with open(log_path, "ab") as log, open(output_path, "wb") as output, MemoryWatch(service) as watch:
        adopt_orphans(True)
        try:
            began = time.monotonic()
            process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=log, **place.as_user())
            wall, code, cpu_command = reap(process, began)
        finally:
            adopt_orphans(False)
    began = time.monotonic()
    if result:
        sync_files(result)
    unsynced = time.monotonic() - began
    busy, cpu_service, cpu_server, cpu_store, cpu_load, own = (b - a for a, b in zip(before, usage()))
    if code:
        raise BenchError(f"{name}: exit code {code}\n{tail(output_path)}\n{tail(log_path)}".replace("\n\n", "\n"))
    cpu = cpu_command + cpu_service + cpu_server
    foreign = max(0.0, busy - cpu - cpu_store - cpu_load - own) / ((wall + unsynced) * machine.CORES)
    return Sample(wall=wall + unsynced, unsynced=unsynced, cpu=cpu, cpu_command=cpu_command, cpu_service=cpu_service,
                  cpu_server=cpu_server, memory=watch.peak, foreign=foreign, waited=waited,
                  requests=requests(output_path))


def requests(output: Path) -> int | None:
    try:
        return json.loads(output.read_text())["store_requests"]
    except (ValueError, KeyError, TypeError):
        return None  # not ours, or no JSON


def reap(process: subprocess.Popen, began: float) -> tuple[float, int, float]:
    """Waits for the command and for all that it left behind: its wall time and exit code, everyone's CPU."""
    wall, code, cpu = 0.0, 0, 0.0
    limit = threading.Timer(LIMIT_SECONDS, end_descendants)
    limit.daemon = True
    limit.start()
    try:
        while True:
            pid, status, usage = os.wait4(-1, 0)
            cpu += usage.ru_utime + usage.ru_stime
            if pid == process.pid:
                wall = time.monotonic() - began
                code = process.returncode = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return wall, code, cpu
    except BaseException:
        if process.returncode is None:
            process.terminate()
            process.wait()
        raise
    finally:
        limit.cancel()


def end_descendants():
    """Of a command that hangs. Services are none: they were started over a shell that ended."""
    for pid in machine.tree(os.getpid())[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def adopt_orphans(on: bool):
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def sync_files(folder: Path):
    """Makes a folder durable, file by file: nothing to do for a tool that has done it, and no one else's bytes."""
    for parent, folders, files in os.walk(folder):
        for name in [*files, *folders]:
            sync_one(os.path.join(parent, name))
    sync_one(folder)


def sync_one(path):
    if os.path.islink(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def warm(folder: Path):
    """Reads every file once, so that it lies in the page cache."""
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                with open(os.path.join(parent, name), "rb", buffering=0) as file:
                    while file.read(4 << 20):
                        pass
            except FileNotFoundError:
                pass  # a server's temporary file


def size(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(parent, name)).st_size for name in files)
    return total


def tail(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-2000:]
