"""`make bench`: measures an area, writes the report, prints the table, and says by its exit code whether the bars are met.

Exit codes: 0 every bar is met, 1 one is missed, 2 it could not be measured.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import backup
import fingerprint
import machine
import picture
import wal
import walfleet
from place import PROJECT, BenchError, Place, say
from programs import Programs
from report import Report
from rows import wanted

AREAS = {"backup": backup.run, "wal": wal.run}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--area", default="", help=f"one of {', '.join(AREAS)}; all if not given")
    parser.add_argument("--quick", action="store_true", help="small data, no repetition of disturbed samples")
    parser.add_argument("--agent", type=Path, required=True, help="the walfleet-agent to measure")
    parser.add_argument("--rows", default="", help="comma list of beginnings of row names; all rows if not given")
    parser.add_argument("--pgbackrest", type=Path, required=True, help="the pgbackrest to compare with")
    for name in ("restic", "rustic", "minio"):
        parser.add_argument(f"--{name}", type=Path, help=f"the {name} to measure with; its rows are left out if not given")
    parser.add_argument("--note", action="append", default=[], help="to be told in the report")
    args = parser.parse_args()
    if args.area and args.area not in AREAS:
        parser.error(f"there is no area {args.area!r}; there is {', '.join(AREAS)}")
    # An ordinary end, so that servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(2))
    try:
        return measure(args)
    except BenchError as error:
        say(f"bench: {error}")
    except KeyboardInterrupt:
        say("bench: interrupted")
    return 2


def measure(args) -> int:
    began = time.monotonic()
    areas = wanted(args.rows, args.area)
    place = Place(args.quick)
    place.make(args.agent)
    report = Report(machine.facts(), place.report, settings={"quick": args.quick, "samples": place.sizes.samples})
    report.versions["revision"] = walfleet.revision(PROJECT)
    report.versions["agent"] = fingerprint.digest(args.agent)[:12]
    for note in args.note:
        report.note(note)
    programs = Programs(args.pgbackrest, args.restic, args.rustic, args.minio)
    for rows in areas:
        AREAS[rows.area](place, report, programs, rows)
    report.settings["took_seconds"] = round(time.monotonic() - began)
    path = report.write()
    picture.draw(report.document(), path.with_suffix(".svg"))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    print(f"\n{report.machine['cpu']}, {report.machine['cores']} cores · {versions} · "
          f"{report.settings['cluster_bytes'] / 1e9:.2f} GB\n\n{report.table()}\n\nwritten to {path}")
    for note in report.notes:
        print(note)
    missed = report.missed()
    if report.unmeasured:
        print(f"not measured: {', '.join(report.unmeasured)}")
    print(f"missed: {', '.join(missed)}" if missed else "every bar that was measured is met")
    return 2 if report.unmeasured else 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
