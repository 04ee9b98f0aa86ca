"""What receives WAL as it is written: our agent that streams, and PostgreSQL's pg_receivewal in its place."""

import time
from pathlib import Path

from cluster import Cluster
from daemon import PATIENCE_SECONDS, Daemon
from place import BenchError, Place

STREAMING = {"streaming": "on"}

SLOT = "bench"


class PgReceiveWal:
    """With a slot, as it would be used in production; to a folder, uncompressed."""

    name = "pg_receivewal"
    title = "pg_receivewal"

    def __init__(self, place: Place):
        self.place = place
        self.repository = place.folder / "repositories" / self.name
        self.daemon = Daemon(place, self.name, place.postgres / "pg_receivewal")

    def begin(self, data: Path, connection: str):
        del data, connection
        self.place.fresh(self.repository)

    def archive_command(self) -> str:
        return "true"

    def attach(self, cluster: Cluster):
        arguments = ["-D", self.repository, "-h", cluster.sockets, "-p", cluster.port, "-U", "postgres", "--slot", SLOT]
        self.place.run(self.daemon.program, *arguments, "--create-slot", "--if-not-exists")
        self.daemon.start(arguments, lambda: True)

    def end(self):
        self.daemon.end()


def serve(tool, cluster: Cluster, settings: str = ""):
    """Starts the server with what receives its WAL, and returns once that does."""
    tool.begin(cluster.data, cluster.connection)
    cluster.start(tool.archive_command(), settings)
    if isinstance(tool, PgReceiveWal):
        tool.attach(cluster)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while cluster.query("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == "0":
        if time.monotonic() > deadline:
            raise BenchError(f"{tool.title} does not stream within {PATIENCE_SECONDS} seconds")
        time.sleep(0.1)


def unserve(tool, cluster: Cluster):
    tool.end()
    cluster.stop()
