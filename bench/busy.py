"""What a backup costs the transactions of a server under load, and what the load costs the backup.

pgbench sends its TPC-B-like transactions at a fixed rate, half of what the machine does with nothing beside it, so that
latency shows what the server's users would feel; a transaction that could not begin in time counts from when it should have.
Latencies are of those transactions that ended while the backup ran.
"""

import time
from dataclasses import replace
from pathlib import Path

import timed
from cluster import Cluster
from daemon import Daemon
from place import BenchError, Place, say
from report import Measured
from samples import Samples, measured
from timed import Sample
from walfleet import Walfleet

CLIENTS = 8

# Before it is measured: until checkpoints, caches and pgbench's own queue are as they stay.
SETTLE_SECONDS = 5

# Of each sample, before its backup begins: what latency is with nothing beside it.
ALONE_SECONDS = 5

# The rate is half of what is done in this time with nothing beside it.
RATE_SECONDS = 10


class Load:
    """pgbench, which writes down each transaction. What it does is its TPC-B-like one, unless told otherwise."""

    def __init__(self, place: Place, cluster: Cluster, transactions: list = ()):
        self.place, self.cluster, self.transactions = place, cluster, transactions
        self.daemon = Daemon(place, "pgbench", place.postgres / "pgbench")
        self.prefix = place.folder / "tmp" / "transactions"

    def __enter__(self):
        self.forget()
        return self

    def __exit__(self, *_):
        self.end()
        self.forget()

    def forget(self):
        for log in self.logs():
            log.unlink()

    def command(self, *options) -> list:
        return ["-h", self.cluster.sockets, "-p", self.cluster.port, "-U", "postgres", "-n", "-c", CLIENTS, *self.transactions, *options,
                "postgres"]

    def rate(self) -> float:
        """Transactions per second with nothing else to do."""
        return self.run(RATE_SECONDS)

    def run(self, seconds: float) -> float:
        """To its end, as fast as it goes: transactions per second."""
        told = self.place.run(self.daemon.program, *self.command("-T", seconds))
        return next(float(line.split()[2]) for line in told.splitlines() if line.startswith("tps"))

    def start(self, rate: float):
        self.daemon.start(self.command("-T", 3600, "-R", rate, "-l", f"--log-prefix={self.prefix}"), lambda: True)
        time.sleep(SETTLE_SECONDS)

    def logs(self) -> list[Path]:
        return list(self.prefix.parent.glob(f"{self.prefix.name}.*"))

    def end(self):
        self.daemon.end()

    def latency(self, since: float, until: float) -> float:
        """Seconds that 99 of 100 transactions took at most, of those that ended in a time.

        A line is: client, transaction, microseconds, script, the end's second and microsecond, microseconds too late
        (pgbench's documentation, "Per-Transaction Logging"). The time includes being too late.
        """
        took = []
        for log in self.logs():
            for line in log.read_text().splitlines():
                fields = line.split()
                if len(fields) < 6 or not fields[2].isdecimal():
                    continue  # skipped, failed, or cut where pgbench was stopped
                if since <= int(fields[4]) + int(fields[5]) / 1e6 <= until:
                    took.append(int(fields[2]) / 1e6)
        if len(took) < 100:
            raise BenchError(f"only {len(took)} transactions ended while the backup ran")
        return sorted(took)[len(took) * 99 // 100]


class Busy:
    def __init__(self, samples: Samples, ours: Walfleet, peer):
        self.samples, self.ours, self.peer = samples, ours, peer
        self.alone: list[float] = []

    def measure(self):
        if not self.samples.rows.wants("busy"):
            return
        with self.samples.attempt("backup.busy"):
            self.samples.cluster.renew()
            self.rows()
        self.samples.cluster.remove()

    def rows(self):
        samples, rate = self.samples, self.rate()
        samples.report.settings["busy_transactions_per_second"] = round(rate)
        taken = samples.alternate("busy", [self.ours, self.peer], lambda tool, row: self.once(tool, row, rate))
        mine, others = (taken.get(tool.name, []) for tool in (self.ours, self.peer))
        if mine:
            samples.report.add("backup.busy", measured(mine, "wall", 1), measured(others, "wall", 1), self.peer.title, "s")
            ours = measured(mine, "latency", 1e-3)
            samples.report.add("backup.busy_latency", ours, measured(others, "latency", 1e-3), self.peer.title, "ms")
            alone = Measured([seconds * 1e3 for seconds in self.alone], [True] * len(self.alone))
            samples.report.add("backup.busy_latency_alone", ours, alone, "no backup", "ms")

    def rate(self) -> float:
        cluster = self.samples.cluster
        timed.warm(cluster.data)
        cluster.start()
        rate = Load(self.samples.place, cluster).rate() / 2
        cluster.stop()
        say(f"backup.busy          {rate:.0f} transactions/s")
        return rate

    def once(self, tool, row: str, rate: float) -> Sample:
        samples, cluster = self.samples, self.samples.cluster
        samples.serve(tool)
        timed.warm(cluster.data)
        with Load(samples.place, cluster) as load:
            load.start(rate)
            began = time.time()
            time.sleep(ALONE_SECONDS)
            since = time.time()
            sample = timed.timed(samples.place, f"{tool.name}-{row}", tool.full_backup(), tool.repository,
                                 service=tool.pid(), server=cluster.pid(), load=load.daemon.pid())
            until = time.time()
            load.end()
            alone = load.latency(began, since)
            sample = replace(sample, latency=load.latency(since, until))
        samples.unserve()
        self.alone.append(alone)
        say(f"backup.{row:<13} {tool.title:<12} 99 % of transactions within {sample.latency * 1e3:.1f} ms, "
            f"{alone * 1e3:.1f} ms before")
        return sample
