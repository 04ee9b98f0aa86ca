"""The rows `lost`: what is gone of acknowledged commits when a host is destroyed at once, server, agent and all files, and all
that is left is the repository.

Each destruction has a host and a repository of its own: a small cluster, its full backup, and clients that remember what was
acknowledged to them. Beside every second one works pgbench as fast as it can; beside the others nothing, so that segments fill
slowly.
"""

import os
import random
import shutil
import signal
import time
from dataclasses import replace

import machine
from busy import Load
from client import TABLE, Clients
from cluster import Cluster
from place import QUICK, say
from receiver import STREAMING, serve
from samples import Samples, one
from walfleet import CLUSTER, Walfleet

LOST_SECONDS_LIMIT = 1.5

# Fast to copy and to back up.
SMALL = replace(QUICK, scale=5, documents=1000)

# A commit waits for the agent, under the name that it streams by.
SYNCHRONOUS = "synchronous_standby_names = 'walfleet'\n"

# How long the clients write before: spread, so that every phase of what the agent does is hit.
SOONEST_SECONDS, LATEST_SECONDS = 2.0, 5.0


class Destruction:
    def __init__(self, samples: Samples, ours: Walfleet):
        self.samples, self.place, self.report = samples, samples.place, samples.report
        self.ours, self.cluster, self.chance = ours, Cluster(self.place, SMALL), random.Random(11)

    def measure(self):
        count = self.place.sizes.destructions
        for row, mode in [("lost_seconds", None), ("lost_commits_repository", "repository")]:
            if self.samples.rows.wants(row):
                with self.samples.attempt(f"wal.{row}"):
                    self.row(row, mode, count)
                self.end()

    def row(self, row: str, mode: str | None, times: int):
        wal = STREAMING | ({"synchronous": mode} if mode else {})
        if not self.ours.knows(wal):
            return self.report.note(f"wal.{row} is left out: this agent does not know {wal}")
        tool = Walfleet(self.place, self.ours.processes, self.ours.level, wal=wal)
        self.cluster.make()
        self.report.settings.setdefault("destructions", {})[row] = times
        lost = [self.once(tool, row, mode, busy=number % 2 == 0) for number in range(times)]
        if mode:
            self.report.add(f"wal.{row}", one(max(count for count, _ in lost)), one(0), "limit", "commits")
        else:
            self.report.add(f"wal.{row}", one(max(seconds for _, seconds in lost)), one(LOST_SECONDS_LIMIT), "limit", "s")

    def once(self, tool: Walfleet, row: str, mode: str | None, busy: bool) -> tuple[int, float]:
        """How many acknowledged commits were lost, and how many seconds before the end the first of them was acknowledged."""
        self.cluster.renew()
        serve(tool, self.cluster, SYNCHRONOUS if mode else "")
        self.cluster.query(TABLE)
        self.place.run(*tool.full_backup())
        clients = Clients(self.cluster)
        with Load(self.place, self.cluster) as load:
            if busy:
                load.daemon.start(load.command("-T", 3600), lambda: True)
            clients.start()
            time.sleep(self.chance.uniform(SOONEST_SECONDS, LATEST_SECONDS))
            at = self.destroy(tool)
            clients.end()
        began = time.monotonic()
        self.place.run(*tool.restore_of(CLUSTER, self.cluster.data), "--latest")
        self.cluster.start()
        self.cluster.await_promotion()
        took = time.monotonic() - began
        found = {int(number) for number in self.cluster.query("SELECT number FROM commits").split()}
        self.cluster.stop("immediate")
        lost = [when for number, when in clients.acknowledged.items() if number not in found]
        seconds = max(0.0, at - min(lost)) if lost else 0.0
        say(f"{self.samples.name(row)} {len(lost)} of {len(clients.acknowledged)} commits lost, {seconds:.2f} s; "
            f"{'busy' if busy else 'quiet'}, back in {took:.1f} s")
        self.report.record(f"wal.{row}", tool.name, {"lost": len(lost), "acknowledged": len(clients.acknowledged),
                                                     "busy": busy, "seconds": round(seconds, 3), "back_seconds": round(took, 3)})
        return len(lost), seconds

    def destroy(self, tool: Walfleet) -> float:
        """Kills server and agent and removes their files; when."""
        doomed = [tool.pid(), *machine.tree(self.cluster.pid())]
        at = time.monotonic()
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # a backend that ended just then
        tool.end()
        self.place.fresh(self.cluster.data)
        for socket in self.cluster.sockets.glob(".s.PGSQL.*"):
            socket.unlink()
        shutil.rmtree(tool.state)
        return at

    def end(self):
        self.ours.end()
        self.cluster.remove()
