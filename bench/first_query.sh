#!/bin/sh
# From nothing to an answer: restores, starts the server and asks until it is out of recovery and has the last row.
# Arguments: PostgreSQL's programs, data directory, folder of sockets, log, and the command that restores.
set -eu
programs=$1 data=$2 sockets=$3 log=$4
shift 4
"$@" >&2
# Behind what is measured: the server ends, and its CPU is told.
trap '"$programs/pg_ctl" -D "$data" -m immediate -W stop >/dev/null 2>&1 &' EXIT
"$programs/pg_ctl" -D "$data" -l "$log" -w -t 600 start >/dev/null
question="SELECT count(*) FROM last WHERE NOT pg_is_in_recovery()"
until [ "$("$programs/psql" -h "$sockets" -U postgres -d postgres -XAtqc "$question" 2>/dev/null)" = 1 ]; do
  [ -e "$data/postmaster.pid" ] || { tail -n 20 "$log" >&2; exit 1; }
  sleep 0.05
done
