"""What the figures are held against beside the peer: PostgreSQL's own base backup, and the compressor alone."""

import shutil

import timed
from cluster import Cluster
from place import Place
from timed import Sample


class Reference:
    def __init__(self, place: Place, cluster: Cluster, processes: int, level: int):
        self.place, self.cluster, self.processes, self.level = place, cluster, processes, level
        self.folder = place.folder / "repositories" / "reference"

    def base_backup(self) -> Sample:
        """A tar compressed by the server with as many threads; neither encrypted nor deduplicated."""
        self.cluster.start()
        compression = f"server-zstd:level={self.level},workers={self.processes}"
        sample = self.take("full_basebackup", "--format=tar", f"--compress={compression}")
        self.cluster.stop()
        return sample

    def zstd(self) -> Sample:
        """The same bytes through the compressor, with nothing else done to them."""
        self.place.fresh(self.folder)
        timed.warm(self.cluster.data)
        script = (f"find {self.cluster.data}/base {self.cluster.data}/global -type f -print0 | sort -z | xargs -0 cat "
                  f"| zstd -q -T{self.processes} -{self.level} -o {self.folder}/all.zst")
        sample = timed.timed(self.place, "full_zstd", ["sh", "-c", script], self.folder)
        shutil.rmtree(self.folder)
        return sample

    def incremental(self, salts: list[int]) -> list[Sample]:
        """PostgreSQL 17's incremental backups, each after a change of its own; not combined into anything restorable."""
        self.cluster.renew()
        self.cluster.start(settings="summarize_wal = on\n")
        previous = self.place.folder / "repositories" / "previous"
        self.take("first_basebackup", keep=previous)
        samples = []
        for salt in salts:
            self.cluster.change(salt)
            self.cluster.query("CHECKPOINT")
            manifest = previous / "backup_manifest"
            samples.append(self.take("changed_pg17", f"--incremental={manifest}", keep=previous))
        self.cluster.stop()
        shutil.rmtree(previous)
        return samples

    def take(self, row: str, *options: str, keep=None) -> Sample:
        self.place.fresh(self.folder)
        timed.warm(self.cluster.data)
        command = [self.place.postgres / "pg_basebackup", "-h", self.place.sockets, "-U", "postgres", "-D", self.folder,
                   "--checkpoint=fast", "--wal-method=none", *options]
        sample = timed.timed(self.place, row, command, self.folder, server=self.cluster.pid())
        if keep:
            shutil.rmtree(keep, ignore_errors=True)
            self.folder.rename(keep)
        else:
            shutil.rmtree(self.folder)
        return sample
