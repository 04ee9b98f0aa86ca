"""The area `backup`: full backup and full restore; further backups after nothing and after 1 % of the pages changed;
restores after twenty of those; and what a fortnight of daily backups takes.

Samples of the two tools alternate wherever they can, so that a slow minute of the machine hits both.
"""

import filecmp
import os
import random
import shutil
from pathlib import Path

import timed
from cluster import Cluster
from pgbackrest import PgBackRest
from place import BenchError, Place, say
from reference import Reference
from report import Measured, Report
from timed import Sample
from walfleet import Walfleet

PROCESSES = 2
LEVEL = 3

# At most so much of the peer's, by row and quantity.
BARS = {"full": 0.8, "full_cpu": 0.9, "restore": 0.6, "unchanged": 0.5, "changed": 0.15, "changed_stored": 0.25, "delta": 0.4,
        "restore_chain": 0.6, "fortnight_stored": 0.5, "full_basebackup": 1.1, "full_zstd": 1.1, "changed_pg17": 2.0}

# Peak memory of any backup or restore.
MEMORY_LIMIT = 256 << 20

# Backups of 1 % changed pages each that a restore is measured after.
CHAIN = 20

# Days, changed pages in percent a day, and when the peer takes a full one.
FORTNIGHT, DAILY_PERCENT, WEEK = 14, 3, 7


def run(place: Place, report: Report, pgbackrest: Path):
    cluster = Cluster(place)
    ours, peer = Walfleet(place, PROCESSES, LEVEL), PgBackRest(place, pgbackrest, PROCESSES, LEVEL)
    ours.end()  # what a killed run may have left
    try:
        cluster.make()
        report.versions.update({ours.name: ours.version(), peer.name: peer.version(), "postgres": cluster.version})
        report.settings.update({"pgbench_scale": place.sizes.scale, "documents": place.sizes.documents,
                                "cluster_bytes": cluster.bytes(), "checksums": True, "repository": "local folder",
                                ours.name: ours.settings(), peer.name: peer.settings()})
        Backup(place, report, cluster, ours, peer).measure()
    finally:
        cluster.stop()
        ours.end()
        leftovers = [place.folder / f"data-{tool.name}" for tool in (ours, peer)]
        for folder in (cluster.data, ours.restored, peer.restored, *leftovers):
            shutil.rmtree(folder, ignore_errors=True)


class Backup:
    def __init__(self, place: Place, report: Report, cluster: Cluster, ours: Walfleet, peer: PgBackRest):
        self.place, self.report, self.cluster, self.ours, self.peer = place, report, cluster, ours, peer
        self.tools = [ours, peer]
        # What a restore of each tool has to be like.
        self.sources = {tool.name: cluster.data for tool in self.tools}

    def measure(self):
        self.cluster.renew()
        full = self.alternate("full", self.full)
        self.add("full", full)
        self.add("restore", self.alternate("restore", self.restore), stored=False)
        self.add("delta", self.alternate("delta", self.delta), stored=False)
        reference = Reference(self.place, self.cluster, PROCESSES, LEVEL)
        self.against("full_basebackup", full[self.ours.name], "pg_basebackup", self.repeat(
            "full_basebackup", reference.base_backup))
        self.against("full_zstd", full[self.ours.name], f"zstd -T{PROCESSES} -{LEVEL}", self.repeat(
            "full_zstd", reference.zstd))
        unchanged, changed = {}, {}
        for tool in self.tools:
            unchanged[tool.name], changed[tool.name] = self.further(tool)
        self.add("unchanged", unchanged)
        self.add("changed", changed)
        self.against("changed_pg17", changed[self.ours.name], "pg_basebackup --incremental",
                     reference.incremental(self.salts()))
        chain = self.alternate("restore_chain", self.restore)
        self.add("restore_chain", chain, stored=False)
        self.fortnight()
        peaks = [sample["memory"] for samples in self.report.runs.values()
                 for sample in samples.get(self.ours.name, [])]
        self.report.add("backup.memory", *(Measured([value / 1e6], [True]) for value in (max(peaks), MEMORY_LIMIT)),
                        "limit", "MB", bar=1.0)

    def alternate(self, row: str, once) -> dict[str, list[Sample]]:
        """One warm-up and then samples of either tool in turn, until enough are undisturbed or it was tried enough."""
        sizes = self.place.sizes
        taken: dict[str, list[Sample]] = {tool.name: [] for tool in self.tools}
        for round_number in range(1 + sizes.samples + sizes.more_samples):
            order = self.tools if round_number % 2 else self.tools[::-1]
            for tool in order:
                samples = taken[tool.name]
                if round_number == 0:
                    self.note(row, tool, once(tool, row), "warm-up")
                elif sum(sample.clean for sample in samples) < sizes.samples:
                    samples.append(self.note(row, tool, once(tool, row), f"sample {len(samples) + 1}"))
        return taken

    def full(self, tool, row: str) -> Sample:
        self.serve(tool)
        sample = self.backup(tool, row, tool.full_backup())
        self.unserve(tool)
        return sample

    def restore(self, tool, row: str) -> Sample:
        tool.prepare_restore()
        timed.warm(tool.repository)
        sample = timed.timed(self.place, f"{tool.name}-{row}", tool.restore(), tool.restored)
        compare(self.sources[tool.name], tool.restored, tool.title)
        shutil.rmtree(tool.restored)
        return sample

    def delta(self, tool, row: str) -> Sample:
        """A restore over a copy of which 1 % of the pages are damaged."""
        tool.prepare_restore()
        self.place.run(*tool.restore())
        damage(tool.restored)
        timed.warm(tool.repository)
        timed.warm(tool.restored)
        sample = timed.timed(self.place, f"{tool.name}-{row}", tool.delta_restore(), tool.restored)
        compare(self.sources[tool.name], tool.restored, tool.title)
        shutil.rmtree(tool.restored)
        return sample

    def further(self, tool) -> tuple[list[Sample], list[Sample]]:
        """After an unmeasured full backup, some with nothing changed, and some each after a change of its own."""
        self.cluster.renew()
        self.serve(tool)
        self.backup(tool, "first", tool.full_backup())
        unchanged, changed = [], []
        for number in range(1, self.place.sizes.samples + 1):
            sample = self.backup(tool, "unchanged", tool.next_backup())
            unchanged.append(self.note("unchanged", tool, sample, f"sample {number}"))
        for salt in self.salts():
            share = self.cluster.measured_change(salt)
            self.report.settings["changed_pages_percent"] = round(share * 100, 2)
            sample = self.backup(tool, "changed", tool.next_backup())
            changed.append(self.note("changed", tool, sample, f"sample {salt}"))
        for salt in range(len(changed) + 1, CHAIN + 1):
            self.cluster.change(salt)
            self.place.run(*tool.next_backup())
        self.unserve(tool)
        # The data that its last backup has stay for the restores.
        source = self.place.folder / f"data-{tool.name}"
        shutil.rmtree(source, ignore_errors=True)
        self.cluster.data.rename(source)
        self.sources[tool.name] = source
        return unchanged, changed

    def salts(self) -> list[int]:
        return list(range(1, self.place.sizes.samples + 1))

    def fortnight(self):
        """What is stored after daily backups of a cluster of which some percent change every day."""
        stored = {}
        for tool in self.tools:
            self.cluster.renew()
            self.serve(tool)
            for day in range(FORTNIGHT):
                if day:
                    self.cluster.change(100 + day, DAILY_PERCENT)
                self.place.run(*(tool.full_backup() if day % WEEK == 0 else tool.next_backup()))
            stored[tool.name] = tool.stored()
            say(f"  backup.fortnight  {tool.title:<11} stored {stored[tool.name] / 1e6:7.1f} MB after {FORTNIGHT} days")
            self.unserve(tool)
        ours, peer = (Measured([stored[tool.name] / 1e6], [True]) for tool in self.tools)
        self.report.add("backup.fortnight_stored", ours, peer, self.peer.title, "MB", bar=BARS["fortnight_stored"])

    def backup(self, tool, row: str, command: list) -> Sample:
        timed.warm(self.cluster.data)
        before = tool.stored()
        sample = timed.timed(self.place, f"{tool.name}-{row}", command, tool.repository, service=tool.pid(),
                             server=self.cluster.pid())
        sample.stored = tool.stored() - before
        return sample

    def serve(self, tool):
        tool.begin(self.cluster.data, self.cluster.connection)
        self.cluster.start(archive_command=tool.archive_command())
        self.cluster.await_archiving()

    def unserve(self, tool):
        self.cluster.stop()
        tool.end()

    def note(self, row: str, tool, sample: Sample, what: str) -> Sample:
        say(f"  backup.{row:<10} {tool.title:<11} {what:<9} {sample.wall:7.2f} s  cpu {sample.cpu:6.2f} s  "
            f"memory {sample.memory / 1e6:5.0f} MB  stored {sample.stored / 1e6:7.1f} MB  "
            f"others {sample.foreign:4.0%}  waited {sample.waited:3.0f} s")
        return sample

    def repeat(self, row: str, once) -> list[Sample]:
        """Samples of something that is measured alone; the first is a warm-up."""
        samples = [once() for _ in range(1 + self.place.sizes.samples)][1:]
        for number, sample in enumerate(samples, 1):
            say(f"  backup.{row:<16} sample {number} {sample.wall:7.2f} s  cpu {sample.cpu:6.2f} s")
        return samples

    def against(self, row: str, ours: list[Sample], reference_name: str, reference: list[Sample]):
        """Wall time of something measured already, beside something that is no peer."""
        measured = (Measured([sample.wall for sample in samples], [sample.clean for sample in samples])
                    for samples in (ours, reference))
        self.report.add(f"backup.{row}", *measured, reference_name, "s", bar=BARS.get(row))
        self.report.runs[f"backup.{row}"] = {"reference": [sample.document() for sample in reference]}

    def add(self, row: str, taken: dict[str, list[Sample]], stored: bool = True):
        quantities = [("", "s", "wall", 1), ("_cpu", "s", "cpu", 1), ("_memory", "MB", "memory", 1e6)]
        if stored:
            quantities.append(("_stored", "MB", "stored", 1e6))
        for suffix, unit, field, divisor in quantities:
            ours, peer = (Measured([getattr(sample, field) / divisor for sample in taken[tool.name]],
                                   [sample.clean for sample in taken[tool.name]]) for tool in self.tools)
            self.report.add(f"backup.{row}{suffix}", ours, peer, self.peer.title, unit,
                            bar=BARS.get(f"{row}{suffix}"))
        self.report.runs[f"backup.{row}"] = {name: [sample.document() for sample in samples]
                                             for name, samples in taken.items()}


def damage(folder: Path):
    """Overwrites a part of 1 % of the pages, the same ones every time, and leaves size and time of change as they were."""
    chance = random.Random(7)
    for parent, _, files in sorted(os.walk(folder / "base")):
        for name in sorted(files):
            path = Path(parent, name)
            before = path.stat()
            with open(path, "r+b") as file:
                for page in range(before.st_size // 8192):
                    if chance.random() < 0.01:
                        file.seek(page * 8192 + 4096)
                        file.write(b"damaged " * 16)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# A cache that is left out of backups (src/backend/utils/cache/relcache.c), and what every checkpoint writes.
NOT_COMPARED = {"pg_internal.init", "pg_control"}


def compare(source: Path, restored: Path, title: str):
    """A restore counts only if every relation's bytes are back: the server has written nothing since the backup."""
    for folder in ("base", "global"):
        for parent, _, files in os.walk(source / folder):
            for name in set(files) - NOT_COMPARED:
                path = Path(parent, name)
                copy = restored / path.relative_to(source)
                if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
                    raise BenchError(f"{title} restored {copy} otherwise than it was")
