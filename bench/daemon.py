"""A program that serves beside what is measured: started, found again by a file with its process id, and stopped."""

import os
import signal
import time
from pathlib import Path
from typing import Callable

import timed
from place import BenchError, Place

PATIENCE_SECONDS = 30


class Daemon:
    def __init__(self, place: Place, name: str, program: Path):
        self.place, self.program = place, program
        self.pid_file = place.folder / f"{name}.pid"
        self.log = place.logs / f"{name}.log"

    def start(self, arguments: list, ready: Callable[[], bool], environment: str = ""):
        """Over a shell that ends at once, so that it is no child of the timing process. `environment`: A=1 B=2."""
        script = f'{environment} "$0" "$@" >>{self.log} 2>&1 </dev/null & echo $!'
        self.pid_file.write_text(self.place.run("sh", "-c", script, self.program, *arguments))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            if time.monotonic() > deadline or not self.pid():
                raise BenchError(f"{self.program.name} did not start\n{timed.tail(self.log)}")
            time.sleep(0.05)

    def pid(self) -> int | None:
        """Also of one that an earlier run left behind; never of a stranger with the same number."""
        try:
            pid = int(self.pid_file.read_text())
            program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
        except (OSError, ValueError):
            return None
        return pid if program == str(self.program.resolve()) else None

    def end(self):
        pid = self.pid()
        if pid:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while self.pid():
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    deadline += PATIENCE_SECONDS
                time.sleep(0.05)
        self.pid_file.unlink(missing_ok=True)
