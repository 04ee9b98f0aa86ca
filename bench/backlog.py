"""The rows `backlog`: full segments lie in pg_wal, and an archiver in miniature asks for one after the other. The server's
own work is none: what is measured is archive_command and what stands behind it.
"""

import timed
from samples import Samples, measured
from segments import Segments
from timed import Sample
from walfleet import Walfleet

# The compression level follows what waits to be shipped, or does not. An agent that streams would store what a server that
# does not run has left in pg_wal before it is asked for it, and before the clock runs.
ADAPTIVE, FIXED = ({"compression": word, "streaming": "off"} for word in ("adaptive", "fixed"))


class Backlog:
    def __init__(self, samples: Samples, segments: Segments, ours: Walfleet, peer):
        self.samples, self.segments, self.ours, self.peer = samples, segments, ours, peer
        self.place, self.report = samples.place, samples.report

    def measure(self):
        if not self.samples.rows.wants("backlog", "backlog_adaptive"):
            return
        with self.samples.attempt("wal.backlog"):
            self.segments.make()
            fixed = self.with_settings(FIXED) if self.ours.knows(FIXED) else self.ours
            taken = self.samples.alternate("backlog", [fixed, self.peer], self.once)
            self.samples.add("backlog", taken, fixed, self.peer)
            if self.samples.rows.wants("backlog_adaptive"):
                self.adaptive(taken)
        self.segments.end()

    def adaptive(self, fixed: dict[str, list[Sample]]):
        """Time beside the peer's, bytes beside ours of the fixed level."""
        if not self.ours.knows(ADAPTIVE):
            return self.report.note(f"wal.backlog_adaptive is left out: this agent does not know {ADAPTIVE}")
        tool = self.with_settings(ADAPTIVE)
        taken = self.samples.alternate("backlog_adaptive", [tool], self.once).get(tool.name, [])
        if taken:
            self.report.add("wal.backlog_adaptive", measured(taken, "wall", 1),
                            measured(fixed.get(self.peer.name, []), "wall", 1), self.peer.title, "s")
            self.report.add("wal.backlog_adaptive_stored", measured(taken, "stored", 1e6),
                            measured(fixed.get(self.ours.name, []), "stored", 1e6), f"level {self.ours.level}", "MB")

    def with_settings(self, wal: dict) -> Walfleet:
        return Walfleet(self.place, self.ours.processes, self.ours.level, wal=wal)

    def once(self, tool, row: str) -> Sample:
        data = self.segments.lay_out()
        tool.begin(data, self.samples.cluster.connection)
        try:
            timed.warm(self.segments.folder)
            sample = timed.timed(self.place, f"{tool.name}-{row}", archiver(self.place, data, tool.archive_command()),
                                 tool.repository, service=tool.pid())
            sample.stored = tool.wal_stored()
            return sample
        finally:
            tool.end()


def archiver(place, data, command: str) -> list:
    return ["python3", place.script("miniature.py"), "archive", data, command]
