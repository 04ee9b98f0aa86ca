"""The rows `push`: what single calls of archive_command take on a server that works at half of what it could.

A wrapper around archive_command, the same for both, writes down each call beside an empty one at the same moment
(bench/time_call.sh).
"""

import statistics
import time

import machine
from cluster import Cluster
from place import LIMIT_SECONDS, BenchError, say
from report import Measured
from samples import Samples
from segments import SETTINGS, Work
from walfleet import Walfleet
from watched import Watched


class Pushes:
    def __init__(self, samples: Samples, ours: Walfleet, peer):
        self.samples, self.ours, self.peer = samples, ours, peer
        self.place, self.report = samples.place, samples.report
        self.cluster: Cluster = samples.cluster
        self.log = self.place.folder / "tmp" / "calls"
        # Of each sample: milliseconds of its calls, and whether it was undisturbed.
        self.taken: dict[str, list[tuple[list[float], bool]]] = {ours.name: [], peer.name: [], "empty": []}

    def measure(self):
        if not self.samples.rows.wants("push", "push_p99", "push_empty"):
            return
        with self.samples.attempt("wal.push"):
            self.cluster.renew()
            self.cluster.start(settings=SETTINGS)
            rate = Work(self.place, self.cluster).load().rate() / 2
            self.cluster.stop()
            for number in range(self.place.sizes.samples):
                for tool in (self.ours, self.peer) if number % 2 else (self.peer, self.ours):
                    with self.samples.attempt(f"wal.push of {tool.title}"):
                        self.once(tool, rate)
            self.add()
        self.cluster.remove()

    def once(self, tool, rate: float):
        machine.wait_until_quiet(self.place.sizes.patience_seconds)
        self.log.unlink(missing_ok=True)
        with Watched() as watched:
            calls = self.calls_of(tool, rate)
        took = [call[1] / 1e3 for call in calls]
        empty = [call[0] / 1e3 for call in calls]
        self.taken[tool.name].append((took, watched.clean))
        if tool is self.ours:
            self.taken["empty"].append((empty, watched.clean))
        say(f"{self.samples.name('push')} {tool.title:<12} median {statistics.median(took):7.1f} ms  "
            f"99 % {percentile(took):7.1f} ms  empty {statistics.median(empty):5.1f} ms  others {watched.foreign:4.0%}")
        self.report.record("wal.push", tool.name, {"milliseconds": took, "empty": empty, "foreign": watched.foreign})

    def calls_of(self, tool, rate: float) -> list[list[int]]:
        """The calls of a server under load, once it is at it."""
        self.samples.serve(tool, around=f"{self.place.script('time_call.sh')} {self.log}", settings=SETTINGS)
        wanted = len(self.calls()) + 1 + self.place.sizes.calls  # the first finds what was written before the load
        with Work(self.place, self.cluster).load() as load:
            load.start(rate)
            deadline = time.monotonic() + LIMIT_SECONDS
            while len(calls := self.calls()) < wanted:
                if time.monotonic() > deadline:
                    raise BenchError(f"only {len(calls)} calls of archive_command in {LIMIT_SECONDS} seconds")
                time.sleep(0.2)
        self.samples.unserve()
        calls = calls[wanted - self.place.sizes.calls:]
        failed = [call for call in calls if call[2]]
        if failed:
            raise BenchError(f"{len(failed)} of {len(calls)} calls of archive_command failed")
        return calls

    def calls(self) -> list[list[int]]:
        try:
            return [[int(part) for part in line.split()] for line in self.log.read_text().splitlines(True) if line.endswith("\n")]
        except FileNotFoundError:
            return []

    def add(self):
        ours, peer, empty = (self.medians(name) for name in (self.ours.name, self.peer.name, "empty"))
        if ours:
            self.report.add("wal.push", ours, peer, self.peer.title, "ms")
            self.report.add("wal.push_p99", *(self.worst(tool) for tool in (self.ours, self.peer)), self.peer.title, "ms")
            self.report.add("wal.push_empty", ours, empty, "an empty command", "ms")

    def medians(self, name: str) -> Measured | None:
        taken = self.taken[name]
        return Measured([statistics.median(took) for took, _ in taken], [clean for _, clean in taken]) if taken else None

    def worst(self, tool) -> Measured | None:
        """Of all calls of all samples, what 99 of 100 took at most."""
        taken = self.taken[tool.name]
        took = [each for took, _ in taken for each in took]
        return Measured([percentile(took)], [all(clean for _, clean in taken)]) if took else None


def percentile(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]
