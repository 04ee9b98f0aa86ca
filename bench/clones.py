"""The row `clones_stored`: what a repository takes that holds a cluster and nine clones of it, each with a little change of
its own, beside the cluster alone. The clones are restored by ours, and each is a cluster of its own name on a host that has
seen nothing yet. Small data always: what is compared is bytes.
"""

import shutil

from cluster import Cluster
from pgbackrest import PgBackRest
from place import QUICK, Place, say
from samples import Samples, one
from walfleet import CLUSTER, Walfleet

CLONES = 9

# Of pgbench, in each clone.
TRANSACTIONS = 200


def measure(samples: Samples, ours: Walfleet, peer: PgBackRest, others: list):
    if not samples.rows.wants("clones_stored"):
        return
    samples.report.settings["clones"] = {"pgbench_scale": QUICK.scale, "documents": QUICK.documents,
                                         "clones": CLONES, "transactions_each": TRANSACTIONS}
    clones = Clones(samples, ours, peer, others)
    try:
        with samples.attempt("backup.clones_stored"):
            clones.measure()
    finally:
        clones.end()


def end(place: Place):
    """What a killed run may have left."""
    for number in range(1, 1 + CLONES):
        Clone(place, number).remove()


class Clone(Cluster):
    """Its own folder, sockets and port; number 0 is the source, the others come from a restore of it."""

    def __init__(self, place: Place, number: int):
        super().__init__(place, QUICK)
        self.name = f"clone-{number}" if number else CLUSTER
        self.data = place.folder / f"data-{self.name}"
        if number:
            self.sockets, self.port = place.folder / f"run-{number}", 5432 + number

    def remove(self):
        super().remove()
        if self.sockets != self.place.sockets:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def work(self):
        self.place.run(self.place.postgres / "pgbench", "-h", self.sockets, "-p", self.port, "-U", "postgres", "-n",
                       "-t", TRANSACTIONS, "postgres")


class Clones:
    def __init__(self, samples: Samples, ours: Walfleet, peer: PgBackRest, others: list):
        self.samples, self.place, self.ours, self.peer, self.others = samples, samples.place, ours, peer, others
        self.tools = {tool.name: tool for tool in (ours, peer, *others)}  # without those that failed
        self.clusters = [Clone(self.place, number) for number in range(1 + CLONES)]

    def measure(self):
        source = self.clusters[0]
        Cluster(self.place, QUICK).make()
        source.renew()
        self.ours.begin(source.data, source.connection)
        self.let(self.peer, lambda: self.peer.begin(source.data, source.connection))
        for tool in self.others:
            self.let(tool, tool.begin)
        self.serve(source)
        self.back_up(source)
        alone = self.stored()
        for clone in self.clusters[1:]:
            self.ours.serve(clone.data, clone.connection, clone.name)
            for folder in (clone.data, clone.sockets):
                self.place.fresh(folder)
            self.place.run(*self.ours.restore_of(CLUSTER, clone.data), "--keep-archiving")
            self.let(self.peer, lambda: self.peer.add_stanza(clone.name, clone.data, clone.sockets, clone.port))
            self.serve(clone)
            clone.await_promotion()
            clone.work()
            self.back_up(clone)
            say(f"backup.clones_stored {clone.name:<12} " + "  ".join(
                f"{name} {size / 1e6:.1f} MB" for name, size in self.stored().items()))
        self.add(alone, self.stored())

    def serve(self, cluster: Clone):
        archiving = [tool.archive_command() for tool in (self.ours, self.peer) if tool.name in self.tools]
        cluster.start(archive_command=" && ".join(archiving))

    def back_up(self, cluster: Clone):
        """Under the cluster's own name by all; those that know only files get it at rest."""
        cluster.await_archiving()
        self.place.run(*self.ours.full_backup())
        self.let(self.peer, lambda: self.place.run(*self.peer.full_backup()))
        cluster.stop()
        self.ours.end()
        for tool in self.others:
            self.let(tool, lambda: self.place.run(*tool.backup(cluster.data)))
        if cluster.name != CLUSTER:
            cluster.remove()

    def let(self, tool, act):
        """A peer that fails is left out from there on."""
        if tool.name in self.tools:
            try:
                act()
            except Exception as error:
                del self.tools[tool.name]
                self.samples.report.fail(f"backup.clones_stored of {tool.title}", error, needed=False)

    def stored(self) -> dict[str, int]:
        return {name: tool.stored() for name, tool in self.tools.items()} | {"wal": self.ours.wal_stored()}

    def add(self, alone: dict[str, int], ten: dict[str, int]):
        name, report = self.ours.name, self.samples.report
        report.runs["backup.clones_stored"] = {"alone": alone, "with_clones": ten}
        report.add("backup.clones_stored", one(ten[name] / 1e6), one(alone[name] / 1e6), "one alone", "MB")
        report.add("backup.clones_stored_wal", one((ten[name] + ten["wal"]) / 1e6), one((alone[name] + alone["wal"]) / 1e6),
                   "one alone", "MB")
        peer = ten.get(self.peer.name)
        report.add("backup.clones_stored_peer", one(ten[name] / 1e6), one(peer / 1e6) if peer else None, self.peer.title, "MB")
        for tool in self.others:
            if tool.name in self.tools:
                report.add_other("backup.clones_stored_peer", tool.name, one(ten[tool.name] / 1e6))

    def end(self):
        for cluster in self.clusters:
            cluster.remove()
        self.ours.end()
        for tool in self.others:
            tool.end()
