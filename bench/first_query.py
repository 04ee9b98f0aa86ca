"""The row `first_query`: from nothing, over a full backup and the WAL behind it, to the answer of a server that has all of it."""

import timed
from fetch import Way, best, peer_ways
from samples import Samples
from segments import SETTINGS, Work
from timed import Sample
from walfleet import Walfleet


class FirstQuery:
    def __init__(self, samples: Samples, ours: Walfleet, peer):
        self.samples, self.ours, self.peer = samples, ours, peer
        self.place, self.cluster = samples.place, samples.cluster

    def measure(self):
        if not self.samples.rows.wants("first_query"):
            return
        with self.samples.attempt("wal.first_query"):
            try:
                self.make()
                ours, theirs = Way(self.ours.title, self.ours), peer_ways(self.peer)
                taken = self.samples.alternate("first_query", [ours, *theirs], self.once)
                self.samples.add("first_query", taken, ours, best(theirs, taken), stored=False)
            finally:
                self.ours.end()
        self.cluster.remove()

    def make(self):
        """In both repositories: a full backup, and the same WAL behind it."""
        tools = [self.ours, self.peer]
        self.cluster.renew()
        for tool in tools:
            tool.begin(self.cluster.data, self.cluster.connection)
        self.cluster.start(" && ".join(tool.archive_command() for tool in tools), SETTINGS)
        self.cluster.await_archiving()
        for tool in tools:
            self.place.run(*tool.full_backup())
        work = Work(self.place, self.cluster)
        began = work.lsn()
        work.until(self.place.sizes.replayed)
        self.cluster.query("CREATE TABLE last (number int);\nINSERT INTO last VALUES (1)")
        self.samples.report.settings["replayed_bytes"] = work.lsn() - began
        self.cluster.await_archiving()
        self.cluster.remove()  # restores need its room, and its port

    def once(self, way: Way, row: str) -> Sample:
        tool = way.tool
        tool.prepare_restore()
        restore = tool.restore()
        if tool is self.peer:
            self.place.fresh(tool.spool)
            fetch = tool.restore_command(tool.restored, *way.options)
            restore = [*restore, f"--recovery-option=restore_command={fetch}"]
        timed.warm(tool.repository)
        command = [self.place.script("first_query.sh"), self.place.postgres, tool.restored, self.place.sockets,
                   self.cluster.log, *restore]
        try:
            return timed.timed(self.place, f"{way.name}-{row}", command, None)  # an answer promises nothing durable
        finally:
            self.place.discard(tool.restored)
