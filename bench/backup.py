"""The area `backup`: full backup and full restore; further backups after nothing and after 1 % of the pages changed;
restores after twenty of those; what a fortnight of daily backups and nine clones take; further peers; an object store; a
server under load.

Samples of the two tools alternate wherever they can, so that a slow minute of the machine hits both.
"""

import shutil

import clones
import further_peers
import s3
from busy import Busy
from cluster import Cluster
from fingerprint import fingerprint
from object_store import ObjectStore
from pgbackrest import PgBackRest
from place import Place, say
from programs import Programs
from reference import Reference
from report import Report
from rows import Rows
from samples import Samples, one
from timed import Sample
from walfleet import Walfleet

PROCESSES = 2
LEVEL = 3

# Peak memory of any backup or restore.
MEMORY_LIMIT = 256 << 20

# Backups of 1 % changed pages each that a restore is measured after.
CHAIN = 20

# Days, changed pages in percent a day, and when the peer takes a full one.
FORTNIGHT, DAILY_PERCENT, WEEK = 14, 3, 7


def run(place: Place, report: Report, programs: Programs, rows: Rows):
    cluster = Cluster(place, place.sizes)
    ours, peer = Walfleet(place, PROCESSES, LEVEL), PgBackRest(place, programs.pgbackrest, PROCESSES, LEVEL)
    store = programs.store(place)
    others = further_peers.of(place, programs, PROCESSES, LEVEL, report)
    end(place, cluster, [ours, peer, *others], store)  # what a killed run may have left
    try:
        cluster.make()
        report.versions.update({tool.name: tool.version() for tool in (ours, peer, *others, *([store] if store else []))})
        report.versions["postgres"] = cluster.version
        report.settings.update({"pgbench_scale": place.sizes.scale, "documents": place.sizes.documents,
                                "cluster_bytes": cluster.bytes(), "checksums": True, "repository": "local folder",
                                **{tool.name: tool.settings() for tool in (ours, peer, *others)}})
        report.merge(rows)
        samples = Samples(place, report, rows, cluster)
        Backup(samples, ours, peer).measure()
        further_peers.measure(samples, others)
        clones.measure(samples, ours, peer, others)
        if store:
            s3.measure(samples, Walfleet(place, PROCESSES, LEVEL, store))
        Busy(samples, ours, peer).measure()
        memory(samples, ours)
    finally:
        end(place, cluster, [ours, peer, *others], store)


def end(place: Place, cluster: Cluster, tools: list, store: ObjectStore | None):
    """Nothing of it runs, and only what serves the next run stays."""
    for what in (cluster.remove, *(tool.end for tool in tools), *([store.end] if store else []), lambda: clones.end(place)):
        try:
            what()
        except Exception as error:
            say(f"bench: {error}")
    place.remove_discarded()
    for folder in (*place.folder.glob("repositories/*"), *place.folder.glob("restored/*"), *place.folder.glob("data*")):
        shutil.rmtree(folder, ignore_errors=True)


class Backup:
    def __init__(self, samples: Samples, ours: Walfleet, peer: PgBackRest):
        self.samples, self.ours, self.peer, self.tools = samples, ours, peer, [ours, peer]
        self.place, self.report, self.cluster, self.wants = samples.place, samples.report, samples.cluster, samples.rows.wants
        self.reference = Reference(self.place, self.cluster, PROCESSES, LEVEL)

    def measure(self):
        attempt = self.samples.attempt
        with attempt("full backups and their restores"):
            self.fulls()
        changed: dict[str, list[Sample]] = {}
        if self.wants("unchanged", "changed", "restore_chain", "changed_pg17"):
            with attempt("further backups and their restores"):
                self.furthers(changed)
        if self.wants("changed_pg17") and self.ours.name in changed:
            with attempt("backup.changed_pg17"):
                self.samples.against("changed_pg17", changed[self.ours.name], "pg_basebackup --incremental",
                                     self.reference.incremental(self.salts()))
        if self.wants("fortnight_stored"):
            with attempt("backup.fortnight_stored"):
                self.fortnight()

    def fulls(self):
        """Full backups and what restores them."""
        full: dict[str, list[Sample]] = {}
        if self.wants("full", "restore", "delta", "full_basebackup", "full_zstd"):
            self.cluster.renew()
        if self.wants("full", "full_basebackup", "full_zstd"):
            full = self.samples.alternate("full", self.tools, self.samples.full)
            self.samples.add("full", full, self.ours, self.peer)
        elif self.wants("restore", "delta"):
            for tool in self.tools:
                with self.samples.attempt(f"a full backup of {tool.title}"):
                    full[tool.name] = [self.samples.full(tool, "first")]
        for row, name, once in [("full_basebackup", "pg_basebackup", self.reference.base_backup),
                                ("full_zstd", f"zstd -T{PROCESSES} -{LEVEL}", self.reference.zstd)]:
            if self.wants(row) and self.ours.name in full:
                with self.samples.attempt(f"backup.{row}"):
                    taken = [once() for _ in range(1 + self.place.sizes.samples)][1:]  # the first is a warm-up
                    self.samples.against(row, full[self.ours.name], name, taken)
        if self.wants("restore", "delta"):
            source = fingerprint(self.cluster.data)
            self.samples.sources.update({tool.name: source for tool in self.tools})
            self.cluster.remove()  # restores need its room
        able = [tool for tool in self.tools if tool.name in full]
        for row, once in [("restore", self.samples.restore), ("delta", self.samples.delta)]:
            if self.wants(row):
                self.samples.add(row, self.samples.alternate(row, able, once), self.ours, self.peer, stored=False)

    def furthers(self, changed: dict[str, list[Sample]]):
        unchanged: dict[str, list[Sample]] = {}
        for tool in self.tools:
            with self.samples.attempt(f"backup.unchanged, changed and restore_chain of {tool.title}"):
                self.further(tool, unchanged, changed)
        for row, taken in [("unchanged", unchanged), ("changed", changed)]:
            if taken:
                self.samples.add(row, taken, self.ours, self.peer)
        if self.wants("restore_chain"):
            able = [tool for tool in self.tools if tool.name in self.samples.sources]
            self.samples.add("restore_chain", self.samples.alternate("restore_chain", able, self.samples.restore),
                             self.ours, self.peer, stored=False)
        self.drop()

    def further(self, tool, unchanged: dict, changed: dict):
        """After an unmeasured full backup, some with nothing changed, and some each after a change of its own."""
        self.samples.sources.pop(tool.name, None)
        self.cluster.renew()
        self.samples.serve(tool)
        self.samples.backup(tool, "first", tool.full_backup())
        if self.wants("unchanged"):
            for number in range(1, self.place.sizes.samples + 1):
                sample = self.samples.backup(tool, "unchanged", tool.next_backup())
                unchanged.setdefault(tool.name, []).extend(self.samples.note("unchanged", tool, sample, number))
        done = 0
        if self.wants("changed", "changed_pg17"):
            for salt in self.salts():
                share = self.cluster.measured_change(salt)
                self.report.settings["changed_pages_percent"] = round(share * 100, 2)
                sample = self.samples.backup(tool, "changed", tool.next_backup())
                changed.setdefault(tool.name, []).extend(self.samples.note("changed", tool, sample, salt))
            done = len(self.salts())
        if self.wants("restore_chain"):
            for salt in range(done + 1, CHAIN + 1):
                self.cluster.change(salt)
                self.place.run(*tool.next_backup())
        self.samples.unserve()
        if self.wants("restore_chain"):
            self.samples.sources[tool.name] = fingerprint(self.cluster.data)
        self.cluster.remove()

    def drop(self):
        """Makes room on the disk: nothing refers to these repositories any more."""
        for tool in self.tools:
            shutil.rmtree(tool.repository, ignore_errors=True)

    def salts(self) -> list[int]:
        return list(range(1, self.place.sizes.samples + 1))

    def fortnight(self):
        """What is stored after daily backups of a cluster of which some percent change every day."""
        stored = {}
        for tool in self.tools:
            with self.samples.attempt(f"backup.fortnight_stored of {tool.title}"):
                self.cluster.renew()
                self.samples.serve(tool)
                for day in range(FORTNIGHT):
                    if day:
                        self.cluster.change(100 + day, DAILY_PERCENT)
                    self.place.run(*(tool.full_backup() if day % WEEK == 0 else tool.next_backup()))
                stored[tool.name] = one(tool.stored() / 1e6)
                say(f"backup.fortnight     {tool.title:<12} stored {tool.stored() / 1e6:7.1f} MB after {FORTNIGHT} days")
                self.samples.unserve()
        if self.ours.name in stored:
            self.report.add("backup.fortnight_stored", stored[self.ours.name], stored.get(self.peer.name), self.peer.title,
                            "MB")
        self.drop()


def memory(samples: Samples, ours: Walfleet):
    """The highest peak of ours in any row that is in the report."""
    peaks = [sample["memory"] for runs in samples.report.runs.values() for name, taken in runs.items()
             if name.startswith(ours.name) for sample in taken]
    if samples.rows.wants("memory") and peaks:
        samples.report.add("backup.memory", one(max(peaks) / 1e6), one(MEMORY_LIMIT / 1e6), "limit", "MB")
