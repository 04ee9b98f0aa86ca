"""How samples are taken: the clusters and repositories around a measured command, the turns of the tools, what is said and
recorded of each, and what becomes of rows whose tool fails.
"""

from contextlib import contextmanager

import timed
from cluster import Cluster
from fingerprint import compare, damage
from place import Place, say
from report import Measured, Report
from rows import Rows
from timed import Sample

# Suffix of the row, its unit, the sample's field and what that is divided by.
QUANTITIES = [("", "s", "wall", 1), ("_cpu", "s", "cpu", 1), ("_memory", "MB", "memory", 1e6)]
STORED = ("_stored", "MB", "stored", 1e6)

# What no load changes.
UNDISTURBED = {"stored", "requests"}


class Samples:
    def __init__(self, place: Place, report: Report, rows: Rows, cluster: Cluster):
        self.place, self.report, self.rows, self.cluster = place, report, rows, cluster
        self.area = rows.area
        self.serving = None  # the tool that the server archives to
        # What a restore of each tool has to be like.
        self.sources: dict[str, dict[str, str]] = {}

    @contextmanager
    def attempt(self, what: str, needed: bool = True):
        """Whatever fails within is noted, and the rows behind it are measured all the same."""
        try:
            yield
        except Exception as error:
            self.report.fail(what, error, needed)
            self.clear()

    def clear(self):
        """Nothing runs that the next row did not start itself."""
        tool, self.serving = self.serving, None
        for end in (self.cluster.stop, *([tool.end] if tool else [])):
            try:
                end()
            except Exception as error:
                say(f"bench: {error}")

    def alternate(self, row: str, tools: list, once) -> dict[str, list[Sample]]:
        """One warm-up and then samples of each tool in turn, until enough are undisturbed or it was tried enough."""
        sizes = self.place.sizes
        enough = sizes.wal_samples if self.area == "wal" else sizes.samples
        taken: dict[str, list[Sample]] = {tool.name: [] for tool in tools}
        able = list(tools)
        for round_number in range(1 + enough + sizes.more_samples):
            for tool in [tool for tool in (tools if round_number % 2 else tools[::-1]) if tool in able]:
                samples = taken[tool.name]
                if sum(sample.clean for sample in samples) >= enough:
                    continue
                able.remove(tool)
                with self.attempt(f"{self.area}.{row} of {tool.title}"):
                    sample = once(tool, row)
                    samples += self.note(row, tool, sample, len(samples) + 1 if round_number else 0)
                    able.append(tool)
        return {name: samples for name, samples in taken.items() if samples}

    def full(self, tool, row: str) -> Sample:
        self.serve(tool)
        sample = self.backup(tool, row, tool.full_backup())
        self.unserve()
        return sample

    def restore(self, tool, row: str) -> Sample:
        tool.prepare_restore()
        timed.warm(tool.repository)
        return self.restored(tool, row, tool.restore())

    def delta(self, tool, row: str) -> Sample:
        """A restore over a copy of which 1 % of the pages are damaged."""
        tool.prepare_restore()
        self.place.run(*tool.restore())
        damage(tool.restored)
        timed.warm(tool.repository)
        timed.warm(tool.restored)
        return self.restored(tool, row, tool.delta_restore())

    def restored(self, tool, row: str, command: list) -> Sample:
        try:
            sample = timed.timed(self.place, f"{tool.name}-{row}", command, tool.restored, store=store_of(tool))
            compare(self.sources[tool.name], tool.restored, tool.title)
            return sample
        finally:
            self.place.discard(tool.restored)

    def backup(self, tool, row: str, command: list) -> Sample:
        timed.warm(self.cluster.data)
        before = tool.stored()
        sample = timed.timed(self.place, f"{tool.name}-{row}", command, tool.repository, service=tool.pid(),
                             server=self.cluster.pid(), store=store_of(tool))
        sample.stored = tool.stored() - before
        return sample

    def serve(self, tool, around: str = "", settings: str = ""):
        """Starts the server, which archives to the tool; `around`: a program with arguments that gets archive_command as one
        more."""
        self.serving = tool
        tool.begin(self.cluster.data, self.cluster.connection)
        command = tool.archive_command()
        self.cluster.start(f'{around} "{command}"' if around else command, settings)
        self.cluster.await_archiving()

    def unserve(self):
        self.cluster.stop()
        self.serving.end()
        self.serving = None

    def note(self, row: str, tool, sample: Sample, number: int) -> list[Sample]:
        """Says and records it; number 0 is a warm-up, which is no sample."""
        what = f"sample {number}" if number else "warm-up"
        say(f"{self.name(row)} {tool.title:<12} {what:<9} {sample.wall:7.2f} s  cpu {sample.cpu:6.2f} s  "
            f"memory {sample.memory / 1e6:5.0f} MB  stored {sample.stored / 1e6:7.1f} MB  "
            f"others {sample.foreign:4.0%}  waited {sample.waited:3.0f} s")
        if not number:
            return []
        self.report.record(f"{self.area}.{row}", tool.name, sample.document())
        return [sample]

    def add(self, row: str, taken: dict[str, list[Sample]], ours, peer, stored: bool = True):
        """The rows of all quantities of samples of ours and, unless it failed, the peer's."""
        for suffix, unit, field, divisor in [*QUANTITIES, *([STORED] if stored else [])]:
            mine, others = (measured(taken.get(tool.name, []), field, divisor) for tool in (ours, peer))
            if mine:
                self.report.add(f"{self.area}.{row}{suffix}", mine, others, peer.title, unit)

    def add_other(self, row: str, tool, samples: list[Sample], stored: bool = True):
        for suffix, _, field, divisor in [*QUANTITIES, *([STORED] if stored else [])]:
            if samples:
                self.report.add_other(f"{self.area}.{row}{suffix}", tool.name, measured(samples, field, divisor))

    def against(self, row: str, ours: list[Sample], reference_name: str, reference: list[Sample]):
        """Wall time of something measured already, beside something that is no peer."""
        for number, sample in enumerate(reference, 1):
            say(f"{self.name(row)} {reference_name:<12} sample {number} {sample.wall:7.2f} s  cpu {sample.cpu:6.2f} s")
            self.report.record(f"{self.area}.{row}", "reference", sample.document())
        self.report.add(f"{self.area}.{row}", measured(ours, "wall", 1), measured(reference, "wall", 1), reference_name, "s")

    def name(self, row: str) -> str:
        """As wide as most, for lines that stand under each other."""
        return f"{self.area}.{row}".ljust(20)


def store_of(tool) -> int | None:
    store = getattr(tool, "store", None)
    return store.pid() if store else None


def measured(samples: list[Sample], field: str, divisor: float) -> Measured | None:
    if not samples:
        return None
    return Measured([getattr(sample, field) / divisor for sample in samples],
                    [sample.clean or field in UNDISTURBED for sample in samples])


def one(value: float) -> Measured:
    """Of bytes, which no load disturbs."""
    return Measured([value], [True])
