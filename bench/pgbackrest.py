"""The peer: pgBackRest as its guide recommends it for speed and size, with the settings that ours has."""

from pathlib import Path

import timed
from place import Place

CONFIGURATION = """
[global]
repo1-path={repository}
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass=bench-4b6f8d0a2c5e7f913b5d7f9a1c3e5f70
repo1-bundle=y
repo1-block=y
repo1-retention-full=9
compress-type=zst
compress-level={level}
process-max={processes}
start-fast=y
log-path={logs}
log-level-console=warn
log-level-file=off
lock-path={folder}/tmp/pgbackrest-lock
spool-path={spool}
archive-async={asynchronous}
"""

STANZA = """
[{stanza}]
pg1-path={data}
pg1-socket-path={sockets}
pg1-port={port}
pg1-user=postgres
pg1-database=postgres
"""


class PgBackRest:
    name = "pgbackrest"
    title = "pgBackRest"

    def __init__(self, place: Place, program: Path, processes: int, level: int, asynchronous: bool = False):
        self.place, self.program, self.processes, self.level = place, program, processes, level
        self.asynchronous = asynchronous  # WAL goes through a spool, several segments at once
        self.repository = place.folder / "repositories" / self.name
        self.restored = place.folder / "restored" / self.name
        self.configuration = place.folder / "etc" / "pgbackrest.conf"
        self.spool = place.folder / "tmp" / "pgbackrest-spool"
        self.stanza = "bench"

    def version(self) -> str:
        return self.place.run(self.program, "version").split()[-1]

    def settings(self) -> dict:
        return {"processes": self.processes, "compression": f"zst level {self.level}", "encryption": "AES-256-CBC",
                "checkpoint": "start-fast", "bundle": True, "block": True, "archive_async": self.asynchronous}

    def begin(self, data: Path, connection: str):
        """A new repository. The server need not run yet."""
        del connection  # the configuration has its parts
        self.place.fresh(self.repository)
        self.place.fresh(self.spool)
        self.configuration.write_text(CONFIGURATION.format(
            repository=self.repository, level=self.level, processes=self.processes, logs=self.place.logs,
            folder=self.place.folder, spool=self.spool, asynchronous="y" if self.asynchronous else "n"))
        self.add_stanza("bench", data, self.place.sockets, 5432)

    def add_stanza(self, stanza: str, data: Path, sockets: Path, port: int):
        """One more cluster in the same repository; the commands that follow are about it."""
        self.stanza = stanza
        with open(self.configuration, "a", encoding="utf-8") as file:
            file.write(STANZA.format(stanza=stanza, data=data, sockets=sockets, port=port))
        self.place.run(*self.command("stanza-create", "--no-online"))

    def pid(self) -> None:
        """It has no daemon."""

    def end(self):
        pass

    def command(self, *arguments) -> list:
        return [self.program, f"--config={self.configuration}", f"--stanza={self.stanza}", *arguments]

    def archive_command(self) -> str:
        return " ".join(str(part) for part in self.command("archive-push", "%p"))

    def restore_command(self, folder: Path, *options: str) -> str:
        return " ".join(str(part) for part in self.command(f"--pg1-path={folder}", *options, "archive-get", "%f", "%p"))

    def full_backup(self) -> list:
        return self.command("backup", "--type=full")

    def next_backup(self) -> list:
        return self.command("backup", "--type=incr")

    def prepare_restore(self):
        self.place.discard(self.restored)
        self.place.fresh(self.restored)

    def restore(self) -> list:
        return self.command(f"--pg1-path={self.restored}", "restore", "--archive-mode=off")

    def delta_restore(self) -> list:
        """Compares checksums; by size and time of change alone it would miss the damage."""
        return [*self.restore(), "--delta"]

    def stored(self) -> int:
        """Bytes of backups, WAL not counted."""
        return timed.size(self.repository / "backup")

    def wal_stored(self) -> int:
        return timed.size(self.repository / "archive")
