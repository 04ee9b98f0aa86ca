"""The row `fetch`: a recovery in miniature asks for the segments of the backlog in the order of their replay. Replay itself is
not there, so nothing hides what a fetch takes.
"""

import json
import shutil
from dataclasses import dataclass, field

import timed
from backlog import archiver
from place import BenchError
from samples import Samples, measured
from segments import AHEAD, SEGMENT, Segments, identify, number, switch_to
from timed import Sample
from walfleet import CLUSTER, Walfleet

# What a restore writes down for the fetches that follow (agent/src/wal/fetch.rs).
SOURCE = "pg_wal/walfleet-restore.json"

# The peer's ways: the best of them is what ours is held against.
PEER_WAYS = {"pgBackRest, one by one": ["--no-archive-async"], "pgBackRest, async": [],
             "pgBackRest, async, 1 GiB queue": ["--archive-get-queue-max=1GiB"]}


@dataclass
class Way:
    """How a tool fetches, in the place of a tool where samples are taken in turn."""

    title: str
    tool: object
    options: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.title.replace(", ", "-").replace(" ", "_")


def best(ways: list[Way], taken: dict[str, list[Sample]]) -> Way:
    """By wall time; of ways that all failed, the first."""
    able = [way for way in ways if way.name in taken]
    return min(able, key=lambda way: measured(taken[way.name], "wall", 1).median(), default=ways[0])


def peer_ways(peer) -> list[Way]:
    return [Way(title, peer, options) for title, options in PEER_WAYS.items()]


class Fetch:
    def __init__(self, samples: Samples, segments: Segments, ours: Walfleet, peer):
        self.samples, self.segments, self.ours, self.peer = samples, segments, ours, peer
        self.place, self.cluster = samples.place, samples.cluster
        self.data = self.place.folder / "restored" / "recovery"
        self.names = self.place.folder / "etc" / "segments"
        self.source = self.place.folder / "etc" / "restore.json"  # of ours
        self.checked: set[str] = set()

    def measure(self):
        if not self.samples.rows.wants("fetch"):
            return
        with self.samples.attempt("wal.fetch"):
            self.segments.make()
            self.names.write_text("\n".join(self.segments.names()))
            ours, theirs = Way(self.ours.title, self.ours), peer_ways(self.peer)
            able = [way for tool, ways in ((self.ours, [ours]), (self.peer, theirs)) if self.archived(tool) for way in ways]
            taken = self.samples.alternate("fetch", able, self.once)
            self.samples.add("fetch", taken, ours, best(theirs, taken), stored=False)
        for folder in (self.data, self.ours.repository, self.peer.repository):
            shutil.rmtree(folder, ignore_errors=True)
        self.segments.end()

    def archived(self, tool) -> bool:
        """Brings the segments into the tool's repository; whether that worked."""
        with self.samples.attempt(f"wal.fetch of {tool.title}"):
            connection = self.cluster.connection
            if tool is self.ours:
                self.back_up()
                tool.serve(self.segments.lay_out(), connection, CLUSTER)
            else:
                tool.begin(self.segments.lay_out(), connection)
            try:
                self.place.run(*archiver(self.place, self.segments.stub, tool.archive_command()))
            finally:
                tool.end()
            if tool is self.ours:
                self.describe()
            return True
        return False

    def back_up(self):
        """A backup whose WAL leads up to the segments."""
        self.cluster.renew()
        self.samples.serve(self.ours)
        self.place.run(*self.ours.full_backup())
        switch_to(self.cluster, AHEAD - 1)
        self.cluster.await_archiving()  # of that one
        self.cluster.stop("immediate")  # a shutdown may archive the next, which is the first of the others
        self.samples.unserve()
        self.cluster.remove()

    def describe(self):
        """Keeps what a restore of that backup, to the end of the segments, writes down."""
        self.ours.prepare_restore()
        self.place.run(*self.ours.restore())
        shutil.copy(self.ours.restored / SOURCE, self.source)
        self.place.give(self.source)
        self.place.discard(self.ours.restored)
        last = self.segments.names()[-1]
        needed = json.loads(self.source.read_text())["needed_to_lsn"]
        high, low = (int(part, 16) for part in needed.split("/"))
        if (high << 32 | low) <= number(last) * SEGMENT:
            raise BenchError(f"the restore ends at {needed}, and the last segment is {last}")

    def once(self, way: Way, row: str) -> Sample:
        tool = way.tool
        self.place.fresh(self.data)
        self.place.fresh(self.data / "pg_wal")
        identify(self.place, self.cluster.template, self.data)
        command = f"{self.ours.agent} wal fetch %f %p"
        if tool is self.ours:
            shutil.copy2(self.source, self.data / SOURCE)
            self.place.give(self.data / SOURCE)
        else:
            self.place.fresh(tool.spool)
            command = tool.restore_command(self.data, *way.options)
        timed.warm(tool.repository)
        act, compared = ("recover", []) if way.name in self.checked else ("check", [self.segments.folder])
        self.checked.add(way.name)  # the first is a warm-up
        recovery = ["python3", self.place.script("miniature.py"), act, self.data, command, self.names, *compared]
        return timed.timed(self.place, f"{way.name}-{row}", recovery, self.data)
