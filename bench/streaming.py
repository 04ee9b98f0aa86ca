"""The rows `pgbench` and `agent`: what streaming costs the transactions of a server, and the host."""

import time
from pathlib import Path

import machine
import timed
from busy import SETTLE_SECONDS, Load
from place import BenchError, say
from receiver import PATIENCE_SECONDS, STREAMING, PgReceiveWal, serve, unserve
from report import Measured
from samples import Samples, one
from segments import SETTINGS, Work
from walfleet import Walfleet
from watched import Watched

# What the agent may take while it streams so much.
BYTES_PER_SECOND = 50_000_000
MEMORY_LIMIT, CPU_LIMIT = 100 << 20, 0.5

# Writes content of the documents into WAL and nowhere else, some hundred kilobytes a transaction.
EMIT = """
\\set first random(1, {last})
SELECT count(pg_logical_emit_message(true, 'bench', body)) FROM documents WHERE id BETWEEN :first AND :first + 299;
"""


class Streaming:
    def __init__(self, samples: Samples, ours: Walfleet):
        self.samples, self.place, self.report, self.cluster = samples, samples.place, samples.report, samples.cluster
        self.ours = Walfleet(self.place, ours.processes, ours.level, wal=STREAMING)
        self.tools = [self.ours, PgReceiveWal(self.place)]
        # Of each pair: microseconds per transaction, and milliseconds that 99 of 100 took at most; and whether undisturbed.
        self.taken: dict[str, list[tuple[float, float, bool]]] = {tool.name: [] for tool in self.tools}

    def measure(self):
        wants = self.samples.rows.wants
        if wants("pgbench", "pgbench_p99"):
            with self.samples.attempt("wal.pgbench"):
                self.pairs()
        if wants("agent_memory", "agent_burst_memory", "agent_cpu"):
            with self.samples.attempt("wal.agent_memory and wal.agent_cpu"):
                self.agent()
        self.end()
        self.cluster.remove()

    def end(self):
        for tool in self.tools:
            tool.end()

    def pairs(self):
        self.cluster.renew()
        timed.warm(self.cluster.data)
        self.cluster.start(settings=SETTINGS)
        rate = Load(self.place, self.cluster).rate() / 2
        self.cluster.stop()
        self.report.settings["streaming_transactions_per_second"] = round(rate)
        for number in range(self.place.sizes.pairs):
            for tool in self.tools if number % 2 else self.tools[::-1]:
                self.taken[tool.name].append(self.once(tool, rate))
        ours, theirs = (self.taken[tool.name] for tool in self.tools)
        for row, field, unit in [("pgbench", 0, "µs/transaction"), ("pgbench_p99", 1, "ms")]:
            self.report.add(f"wal.{row}", column(ours, field), column(theirs, field), self.tools[1].title, unit, paired=True)

    def once(self, tool, rate: float) -> tuple[float, float, bool]:
        """Both figures on a server that was just started and had its checkpoint."""
        seconds = self.place.sizes.seconds
        machine.wait_until_quiet(self.place.sizes.patience_seconds)
        with Watched() as watched:
            try:
                serve(tool, self.cluster, SETTINGS)
                self.cluster.query("VACUUM pgbench_branches, pgbench_tellers;\nCHECKPOINT")
                # Caches, and what receives the WAL: what a start costs once is not what streaming costs.
                Load(self.place, self.cluster).run(SETTLE_SECONDS)
                each = 1e6 / Load(self.place, self.cluster).run(seconds)
                with Load(self.place, self.cluster) as load:
                    load.start(rate)
                    since = time.time()
                    time.sleep(seconds)
                    load.end()
                    latency = load.latency(since, time.time()) * 1e3
            finally:
                unserve(tool, self.cluster)
        say(f"{self.samples.name('pgbench')} {tool.title:<13} {each:7.1f} µs/transaction, {1e6 / each:.0f} transactions/s  "
            f"99 % {latency:7.2f} ms  others {watched.foreign:4.0%}")
        self.report.record("wal.pgbench", tool.name, {"each_us": each, "latency_ms": latency, "foreign": watched.foreign})
        return each, latency, watched.clean

    def agent(self):
        self.cluster.renew()
        script = self.place.folder / "etc" / "emit.sql"
        script.write_text(EMIT.format(last=self.cluster.sizes.documents - 300))
        machine.wait_until_quiet(self.place.sizes.patience_seconds)
        with Watched() as watched:
            try:
                serve(self.ours, self.cluster, SETTINGS)
                work, load = Work(self.place, self.cluster), Load(self.place, self.cluster, ["-f", script])
                began = work.lsn()
                told = load.run(2)
                each = (work.lsn() - began) / (told * 2)
                # That came as fast as it could.
                self.until_stored()
                pid = self.ours.pid()
                burst = high_water(pid)
                forget_high_water(pid)
                load.start(BYTES_PER_SECOND / each)
                since, lsn = time.monotonic(), work.lsn()
                cpu = machine.tree_cpu(pid)
                time.sleep(2 * self.place.sizes.seconds)
                cpu, took, written = machine.tree_cpu(pid) - cpu, time.monotonic() - since, work.lsn() - lsn
                peak = high_water(pid)
                load.end()
            finally:
                unserve(self.ours, self.cluster)
        say(f"{self.samples.name('agent')} {written / took / 1e6:.1f} MB/s of WAL  memory {peak / 1e6:.0f} MB, in a burst before {burst / 1e6:.0f}  "
            f"cpu {cpu / took:.2f} of a core  others {watched.foreign:4.0%}")
        self.report.settings["streamed_bytes_per_second"] = round(written / took)
        if written / took < 0.9 * BYTES_PER_SECOND:
            self.report.note(f"wal.agent: the server wrote only {written / took / 1e6:.0f} MB/s")
        self.report.add("wal.agent_memory", one(peak / 1e6), one(MEMORY_LIMIT / 1e6), "limit", "MB")
        self.report.add("wal.agent_burst_memory", one(burst / 1e6), one(MEMORY_LIMIT / 1e6), "limit", "MB")
        self.report.add("wal.agent_cpu", Measured([cpu / took], [watched.clean]), one(CPU_LIMIT), "limit", "cores")

    def until_stored(self):
        deadline = time.monotonic() + PATIENCE_SECONDS
        end = self.cluster.query("SELECT pg_current_wal_flush_lsn()")
        behind = f"SELECT count(*) FROM pg_stat_replication WHERE flush_lsn < '{end}'"
        while self.cluster.query(behind) != "0":
            if time.monotonic() > deadline:
                raise BenchError(f"{self.ours.title} has not stored {end} within {PATIENCE_SECONDS} seconds")
            time.sleep(0.1)


def column(taken: list[tuple], field: int) -> Measured | None:
    return Measured([sample[field] for sample in taken], [sample[-1] for sample in taken]) if taken else None


def forget_high_water(pid: int):
    """From now on the peak is that of what follows (clear_refs, proc(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def high_water(pid: int) -> int:
    """Bytes that a process held at its peak (VmHWM, proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
