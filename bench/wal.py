"""The area `wal`: WAL on its way to the repository and back. Shipping a backlog and single segments, fetching, the way from
nothing to a first query, and, once the agent streams, what streaming costs and what is lost with a host.
"""

import shutil

from backlog import Backlog
from backup import LEVEL, PROCESSES
from cluster import Cluster
from destruction import Destruction
from fetch import Fetch
from first_query import FirstQuery
from pgbackrest import PgBackRest
from place import Place, say
from programs import Programs
from pushes import Pushes
from receiver import STREAMING, PgReceiveWal
from report import Report
from rows import Rows
from samples import Samples
from segments import Segments
from streaming import Streaming
from walfleet import Walfleet


STREAMING_ROWS = ["pgbench", "pgbench_p99", "agent_memory", "agent_burst_memory", "agent_cpu", "lost_seconds",
                  "lost_commits_repository"]


def run(place: Place, report: Report, programs: Programs, rows: Rows):
    cluster = Cluster(place, place.sizes)
    segments = Segments(place, cluster, place.sizes.segments)
    ours, peer = Walfleet(place, PROCESSES, LEVEL), PgBackRest(place, programs.pgbackrest, PROCESSES, LEVEL, asynchronous=True)
    end(place, cluster, segments, [ours, peer])  # what a killed run may have left
    try:
        cluster.make()
        report.versions.update({tool.name: tool.version() for tool in (ours, peer)}, postgres=cluster.version)
        report.settings.update(
            {"pgbench_scale": place.sizes.scale, "documents": place.sizes.documents, "cluster_bytes": cluster.bytes(),
             "wal": {"segments": segments.count, **{tool.name: tool.settings() for tool in (ours, peer)}}})
        report.merge(rows)
        samples = Samples(place, report, rows, cluster)
        Backlog(samples, segments, ours, peer).measure()
        Fetch(samples, segments, ours, peer).measure()
        Pushes(samples, ours, peer).measure()
        FirstQuery(samples, ours, peer).measure()
        streaming(samples, ours)
    finally:
        end(place, cluster, segments, [ours, peer])


def streaming(samples: Samples, ours: Walfleet):
    """What is only there with an agent that streams."""
    rows = [row for row in STREAMING_ROWS if samples.rows.wants(row)]
    if not rows:
        return
    if ours.knows(STREAMING):
        Streaming(samples, ours).measure()
        Destruction(samples, ours).measure()
    else:
        samples.report.note(f"{', '.join(f'wal.{row}' for row in rows)} are left out: this agent does not know {STREAMING}")


def end(place: Place, cluster: Cluster, segments: Segments, tools: list):
    """Nothing of it runs, and only what serves the next run stays."""
    restored = [Cluster(place, place.sizes, tool.restored) for tool in tools]  # which were started up to a first query
    for what in (cluster.remove, segments.end, PgReceiveWal(place).end, *(tool.end for tool in tools),
                 *(copy.remove for copy in restored)):
        try:
            what()
        except Exception as error:
            say(f"bench: {error}")
    place.remove_discarded()
    for folder in (*place.folder.glob("repositories/*"), *place.folder.glob("restored/*"), *place.folder.glob("data*")):
        shutil.rmtree(folder, ignore_errors=True)
