"""Clients that write one row a transaction and remember when each commit was acknowledged."""

import subprocess
import threading
import time

from cluster import Cluster

CLIENTS = 4

TABLE = "CREATE TABLE commits (number bigint PRIMARY KEY)"


class Clients:
    """Until the server is gone. Each over a psql of its own, so that one waits for no other's commit."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.acknowledged: dict[int, float] = {}  # when, of time.monotonic(); each written by one thread
        self.threads = [threading.Thread(target=self.write, args=(first,), daemon=True) for first in range(CLIENTS)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def end(self):
        """To be called when the server is gone."""
        for thread in self.threads:
            thread.join()

    def write(self, number: int):
        options = {**self.cluster.place.as_user(), "stdin": subprocess.PIPE}
        with subprocess.Popen(self.cluster.psql(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              **options) as psql:
            try:
                while True:
                    psql.stdin.write(f"INSERT INTO commits VALUES ({number}) RETURNING number;\n")
                    psql.stdin.flush()
                    if psql.stdout.readline().strip() != str(number):
                        break
                    self.acknowledged[number] = time.monotonic()
                    number += CLIENTS
            except BrokenPipeError:
                pass
            finally:
                psql.kill()
