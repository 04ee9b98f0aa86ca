"""Real WAL: 16 MiB segments of a server that worked on the bench's cluster, made once and kept; and a data directory in
which they lie as PostgreSQL leaves them for its archiver, without a server.
"""

import os
import shutil
from pathlib import Path

import timed
from busy import Load
from cluster import Cluster
from place import Place, say

SEGMENT = 16 << 20

# How many segments behind the template's last the kept ones begin. A copy of the template that serves has these for WAL of
# its own, so that what it archives leads up to the kept ones.
AHEAD = 8

# Checkpoints every minute: pages whole in WAL, and records that change them.
SETTINGS = "checkpoint_timeout = 60s\nmax_wal_size = 8GB\nsynchronous_commit = off\n"

# Of every four transactions one: text and JSON, which compress as such things do.
DOCUMENTS = """
\\set id random(1, {documents})
\\set other random(1, {documents})
UPDATE documents SET body = reverse(body) WHERE id = :id;
INSERT INTO documents SELECT id + 100000000 + :id, title, reverse(body), meta FROM documents WHERE id = :other ON CONFLICT DO NOTHING;
"""


class Work:
    """Transactions on a running cluster that write WAL."""

    def __init__(self, place: Place, cluster: Cluster):
        self.place, self.cluster = place, cluster
        self.script = place.folder / "etc" / "documents.sql"

    def transactions(self) -> list:
        """For pgbench."""
        self.script.write_text(DOCUMENTS.format(documents=self.cluster.sizes.documents))
        return ["-b", "tpcb-like@3", "-f", f"{self.script}@1"]

    def until(self, segments: int):
        """Works until so many segments are full."""
        began = self.lsn()
        while self.lsn() - began < segments * SEGMENT:
            self.load().run(5)

    def load(self) -> Load:
        return Load(self.place, self.cluster, self.transactions())

    def lsn(self) -> int:
        return int(self.cluster.query("SELECT pg_current_wal_lsn() - '0/0'"))


class Segments:
    def __init__(self, place: Place, cluster: Cluster, count: int):
        self.place, self.cluster, self.count = place, cluster, count
        kind = cluster.template.name.removeprefix("template-")
        self.folder = place.folder / f"segments-{kind}-{count}"
        self.stub = place.folder / "data-stub"  # on the same file system, for links

    def make(self):
        """Makes the segments unless they are there."""
        if (self.folder / "complete").exists():
            return
        say(f"making {self.count} WAL segments")
        for old in self.place.folder.glob("segments-*"):
            shutil.rmtree(old)
        self.place.fresh(self.folder)
        self.cluster.renew()
        self.cluster.start(f"cp %p {self.folder}/%f", SETTINGS)
        switch_to(self.cluster, AHEAD)
        first = self.cluster.query("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
        Work(self.place, self.cluster).until(self.count + 1)
        self.cluster.await_archiving()
        self.cluster.remove()
        names = [name for name in sorted(os.listdir(self.folder)) if len(name) == 24 and name >= first][:self.count]
        for name in set(os.listdir(self.folder)) - set(names):
            (self.folder / name).unlink()
        (self.folder / "complete").touch()

    def names(self) -> list[str]:
        return [name for name in sorted(os.listdir(self.folder)) if name != "complete"]

    def bytes(self) -> int:
        return timed.size(self.folder)

    def lay_out(self) -> Path:
        """A data directory of the segments' cluster, as far as an archiver looks at one: all of them full and ready."""
        self.end()
        status = self.stub / "pg_wal" / "archive_status"
        for folder in (self.stub, self.stub / "pg_wal", status, self.stub / "global"):
            self.place.fresh(folder)
        identify(self.place, self.cluster.template, self.stub)
        for name in self.names():
            os.link(self.folder / name, self.stub / "pg_wal" / name)
            ready = status / f"{name}.ready"
            ready.touch()
            self.place.give(ready)
        return self.stub

    def end(self):
        shutil.rmtree(self.stub, ignore_errors=True)


def identify(place: Place, source: Path, folder: Path):
    """What tells whose data directory it is."""
    for name in ("PG_VERSION", "global/pg_control"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / name, folder / name)
        place.give((folder / name).parent)
        place.give(folder / name)


def number(name: str) -> int:
    """Of a segment of the usual size: its position divided by that."""
    return int(name[8:16], 16) * 256 + int(name[16:], 16)


def switch_to(cluster: Cluster, ahead: int):
    """Lets the server's WAL go on so many segments behind the template's last."""
    control = cluster.place.run(cluster.place.postgres / "pg_controldata", "-D", cluster.template)
    last = next(line.split()[-1] for line in control.splitlines() if "REDO WAL file" in line)
    wanted = number(last) + ahead
    while True:
        name = cluster.query("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
        if number(name) >= wanted:
            return
        cluster.query("SELECT pg_create_restore_point('bench') \\g /dev/null\nSELECT pg_switch_wal()")
