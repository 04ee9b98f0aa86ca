"""How much of the machine others used while something was measured that is no single command."""

import os
import time

import machine
from timed import DISTURBED, adopt_orphans


class Watched:
    """`with` it around everything that is begun for a measurement, servers included, and ended within.

    Whatever is begun within stays below this process, also what a command leaves behind; the rest of the machine's work is
    others'.
    """

    def __init__(self):
        self.foreign = 0.0  # share of all cores; known afterwards

    def __enter__(self):
        adopt_orphans(True)
        self.began, self.before = time.monotonic(), self.others()
        return self

    def __exit__(self, *_):
        took = time.monotonic() - self.began
        self.foreign = max(0.0, self.others() - self.before) / (took * machine.CORES)
        adopt_orphans(False)
        # Adopted ones that ended are nobody's to wait for otherwise.
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def others(self) -> float:
        return machine.busy_seconds() - machine.tree_cpu(os.getpid())

    @property
    def clean(self) -> bool:
        return self.foreign < DISTURBED
