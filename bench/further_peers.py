"""Further peers, for information: restic and rustic, which back up files of whatever kind, deduplicated and encrypted.

They know nothing of PostgreSQL: the server is stopped for them, they take no WAL, check no page and find what changed by
reading each file whose time of change is another. `pg_wal` is left out, as the others leave it out.
"""

import shutil
from pathlib import Path

import timed
from fingerprint import compare, fingerprint
from place import Place
from programs import Programs
from report import Report
from samples import Samples
from timed import Sample

PASSWORD = "bench-4b6f8d0a2c5e7f913b5d7f9a1c3e5f70"


class FilePeer:
    """What the two have in common: one repository format, and nearly one command line."""

    name = ""

    def __init__(self, place: Place, program: Path, processes: int, level: int):
        self.place, self.program, self.processes, self.level = place, program, processes, level
        self.title = self.name
        self.repository = place.folder / "repositories" / self.name
        self.restored = place.folder / "restored" / self.name
        self.cache = place.folder / "tmp" / f"{self.name}-cache"

    def command(self, *arguments) -> list:
        variables = [f"{name}={value}" for name, value in self.variables().items()]
        return ["env", *variables, self.program, *arguments]

    def version(self) -> str:
        return self.place.run(*self.command("version")).split()[1]

    def begin(self):
        self.place.fresh(self.repository)
        shutil.rmtree(self.cache, ignore_errors=True)
        self.place.run(*self.command(*self.init()))

    def end(self):
        for folder in (self.repository, self.restored, self.cache):
            shutil.rmtree(folder, ignore_errors=True)

    def stored(self) -> int:
        return timed.size(self.repository)


class Restic(FilePeer):
    name = "restic"

    def variables(self) -> dict[str, str]:
        return {"RESTIC_REPOSITORY": self.repository, "RESTIC_PASSWORD": PASSWORD, "RESTIC_CACHE_DIR": self.cache,
                "GOMAXPROCS": self.processes}

    def settings(self) -> dict:
        return {"processes": self.processes, "compression": "auto, about zstd level 3", "encryption": "AES-256-CTR, Poly1305"}

    def init(self) -> list:
        return ["init", "--quiet"]

    def backup(self, data: Path) -> list:
        return self.command("backup", "--quiet", "--exclude", f"{data}/pg_wal/*", data)

    def restore(self, data: Path) -> list:
        return self.command("restore", f"latest:{data}", "--quiet", "--target", self.restored)


class Rustic(FilePeer):
    name = "rustic"

    def variables(self) -> dict[str, str]:
        return {"RUSTIC_REPOSITORY": self.repository, "RUSTIC_PASSWORD": PASSWORD, "RUSTIC_CACHE_DIR": self.cache,
                "RUSTIC_NO_PROGRESS": "true", "RUSTIC_LOG_LEVEL": "warn", "RAYON_NUM_THREADS": self.processes}

    def version(self) -> str:
        return self.place.run(self.program, "--version").split()[1]

    def settings(self) -> dict:
        return {"processes": self.processes, "compression": f"zstd level {self.level}", "encryption": "AES-256-CTR, Poly1305"}

    def init(self) -> list:
        return ["init", "--set-compression", str(self.level)]

    def backup(self, data: Path) -> list:
        return self.command("backup", "--glob", f"!{data}/pg_wal/*", data)

    def restore(self, data: Path) -> list:
        return self.command("restore", f"latest:{data}", self.restored)


def of(place: Place, programs: Programs, processes: int, level: int, report: Report) -> list[FilePeer]:
    """Those that were got and do run."""
    found = []
    for kind, program in [(Restic, programs.restic), (Rustic, programs.rustic)]:
        if program:
            try:
                peer = kind(place, program, processes, level)
                peer.version()
                found.append(peer)
            except Exception as error:
                report.fail(kind.name, error, needed=False)
    return found


def measure(samples: Samples, peers: list[FilePeer]):
    for peer in peers:
        with samples.attempt(f"rows of {peer.title}", needed=False):
            FurtherPeer(samples, peer).measure()
        peer.end()


class FurtherPeer:
    def __init__(self, samples: Samples, peer: FilePeer):
        self.samples, self.peer, self.cluster, self.wants = samples, peer, samples.cluster, samples.rows.wants
        self.numbers = range(samples.place.sizes.further_samples + 1)  # 0 is a warm-up

    def measure(self):
        rows = [row for row in ("full", "unchanged", "changed", "restore") if self.wants(row)]
        if not rows:
            return
        self.cluster.renew()
        full = []
        for number in self.numbers if "full" in rows else [0]:
            self.peer.begin()
            full += self.note("full", self.backup("full"), number)
        self.samples.add_other("full", self.peer, full)
        if "restore" in rows:
            self.restores()
        if "unchanged" in rows:
            taken = [self.note("unchanged", self.backup("unchanged"), number)[0] for number in self.numbers if number]
            self.samples.add_other("unchanged", self.peer, taken)
        if "changed" in rows:
            self.changes()

    def restores(self):
        source, taken = fingerprint(self.cluster.data), []
        for number in self.numbers:
            self.samples.place.fresh(self.peer.restored)
            timed.warm(self.peer.repository)
            sample = timed.timed(self.samples.place, f"{self.peer.name}-restore", self.peer.restore(self.cluster.data),
                                 self.peer.restored)
            compare(source, self.peer.restored, self.peer.title)
            self.samples.place.discard(self.peer.restored)
            taken += self.note("restore", sample, number)
        self.samples.add_other("restore", self.peer, taken, stored=False)

    def changes(self):
        taken = []
        for salt in self.numbers[1:]:
            self.cluster.start()
            self.cluster.change(salt)
            self.cluster.stop()
            taken += self.note("changed", self.backup("changed"), salt)
        self.samples.add_other("changed", self.peer, taken)

    def backup(self, row: str) -> Sample:
        timed.warm(self.cluster.data)
        before = self.peer.stored()
        sample = timed.timed(self.samples.place, f"{self.peer.name}-{row}", self.peer.backup(self.cluster.data),
                             self.peer.repository)
        sample.stored = self.peer.stored() - before
        return sample

    def note(self, row: str, sample: Sample, number: int) -> list[Sample]:
        return self.samples.note(row, self.peer, sample, number)
