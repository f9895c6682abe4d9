#!/usr/bin/env bash
# tonic takes the error page of an HTTP proxy for a gRPC message, so a backend that is down looks like a bug in the server.
#
# Versions: tonic 0.14.9, grpcio 1.85.3, @grpc/grpc-js 1.14.7, nginx 1.22.1 (Debian 12).
#
# nginx stands before a gRPC backend that is down and answers 502, in three ways. Three clients call through it:
#
#                              tonic                      grpcio         grpc-js
#   its own page (HTML)        INTERNAL, "invalid         UNAVAILABLE    UNAVAILABLE
#                              compression flag: 60"
#   502 with an empty body     UNAVAILABLE                UNAVAILABLE    UNAVAILABLE
#   grpc-status 14             UNAVAILABLE                UNAVAILABLE    UNAVAILABLE
#
# 60 is the character "<". tonic maps the HTTP status only if no byte of a body comes first; the other two never look at the body.
# nginx fills `return 502 "";` with its page again, so an empty body takes an empty file.
#
# Why it matters: INTERNAL is what most retry policies call permanent. The same outage is retried by a service in Python or
# JavaScript and given up by one in Rust. The third way is the cure to prefer: the proxy answers in gRPC.
#
# Needs: Debian 12 with a fresh `apt-get update`, python3 with venv, node with npm, cargo with a C linker. Takes one to three minutes.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail

# Debian drops a revision when the next comes, so only the version of nginx itself is pinned.
NGINX=1.22.1 TONIC=0.14.9 H2=0.4.20 HYPER=1.12.0 TOKIO=1.54.1 GRPC_JS=1.14.7
PYTHON_PACKAGES=(grpcio==1.85.3 typing-extensions==4.16.0)

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

echo "== installing nginx $NGINX, tonic $TONIC, ${PYTHON_PACKAGES[*]}, @grpc/grpc-js $GRPC_JS"
mkdir deb js client client/src empty
(cd deb && prepare apt-get download "nginx=$NGINX-*" 'libpcre2-8-0=10.42-*')
for package in deb/*.deb; do prepare dpkg-deb -x "$package" root; done
libraries=$(find "$work/root" -name 'lib*.so*' -printf '%h\n' | sort -u | paste -sd:)
nginx=(env LD_LIBRARY_PATH="$libraries" "$work/root/usr/sbin/nginx" -e "$work/nginx.log" -p "$work/" -c nginx.conf)
prepare python3 -m venv python
prepare python/bin/pip install --quiet --no-deps --only-binary=:all: "${PYTHON_PACKAGES[@]}"
prepare npm install --prefix js --no-audit --no-fund "@grpc/grpc-js@$GRPC_JS"

cat >client/Cargo.toml <<END
[package]
name = "client"
version = "0.0.0"
edition = "2021"
[dependencies]
bytes = "=1.12.2"
h2 = "=$H2"
http = "=1.5.0"
hyper = "=$HYPER"
tokio = { version = "=$TOKIO", features = ["rt", "macros"] }
tonic = { version = "=$TONIC", default-features = false, features = ["channel"] }
[profile.dev]
debug = 0
END
# One unary call with an empty request; the codec passes bytes on, so that no message needs to be generated.
cat >client/src/main.rs <<'END'
use bytes::{Buf, BufMut, Bytes};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{transport::Endpoint, Request, Status};

struct Plain;

impl Codec for Plain {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Plain;
    type Decoder = Plain;
    fn encoder(&mut self) -> Plain {
        Plain
    }
    fn decoder(&mut self) -> Plain {
        Plain
    }
}

impl Encoder for Plain {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("usage: client URL")?;
    let mut client = tonic::client::Grpc::new(Endpoint::from_shared(url)?.connect().await?);
    client.ready().await?;
    let path = http::uri::PathAndQuery::from_static("/orders.Orders/Place");
    match client.unary(Request::new(Bytes::new()), path, Plain).await {
        Ok(answer) => println!("Ok: {} bytes", answer.into_inner().len()),
        Err(status) => println!("{:?}: {}", status.code(), status.message()),
    }
    Ok(())
}
END
prepare env CARGO_TARGET_DIR="$work/target" cargo build --quiet --manifest-path client/Cargo.toml

cat >js/call.js <<'END'
const grpc = require("@grpc/grpc-js");
const client = new grpc.Client(process.argv[2], grpc.credentials.createInsecure());
const plain = (bytes) => bytes;
const options = { deadline: Date.now() + 30000 };
client.makeUnaryRequest("/orders.Orders/Place", plain, plain, Buffer.alloc(0), options, (error, answer) => {
  console.log(error ? `${grpc.status[error.code]}: ${error.details}` : `OK: ${answer.length} bytes`);
  client.close();
});
END

echo "== starting nginx before a port where nobody listens"
read -r backend page_port empty_port grpc_port < <(python3 - <<'END'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(s.getsockname()[1] for s in sockets))
END
)
: >empty/empty
cat >nginx.conf <<END
daemon off;
master_process off;
pid nginx.pid;
events {}
http {
  access_log off;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  server {
    listen 127.0.0.1:$page_port http2;
    location / { grpc_pass grpc://127.0.0.1:$backend; }
  }
  server {
    listen 127.0.0.1:$empty_port http2;
    location / { grpc_pass grpc://127.0.0.1:$backend; error_page 502 504 /empty; }
    location = /empty { internal; root empty; }
  }
  server {
    listen 127.0.0.1:$grpc_port http2;
    location / { grpc_pass grpc://127.0.0.1:$backend; error_page 502 504 = @down; }
    location @down {
      default_type application/grpc;
      add_header grpc-status 14;
      add_header grpc-message "backend is down";
      return 204;
    }
  }
}
END
"${nginx[@]}" >>nginx.log 2>&1 &
pids+=($!)

cat >observe.py <<'END'
import socket, subprocess, sys, time
import grpc

page_port, empty_port, grpc_port = sys.argv[1:4]


def wait_for(port):
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
        except OSError as error:
            if time.monotonic() > deadline:
                print("CANNOT RUN: nginx:", error)
                sys.exit(2)
            time.sleep(0.1)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def tonic(port):
    return run("target/debug/client", f"http://127.0.0.1:{port}")


def grpc_js(port):
    return run("node", "js/call.js", f"127.0.0.1:{port}")


def grpcio(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            return f"OK: {len(channel.unary_unary('/orders.Orders/Place')(b'', timeout=30))} bytes"
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"


failures = 0


def check(what, seen, expected):
    global failures
    same = seen == expected
    failures += not same
    print(f"{'ok     ' if same else 'CHANGED'} {what}: {seen!r}" + ("" if same else f", expected {expected!r}"))


wait_for(page_port)
for title, port, expected_of_tonic, expected_of_grpcio, expected_of_grpc_js in [
    ("502 with the page of nginx", page_port,
     "Internal: protocol error: received message with invalid compression flag: 60 (valid flags are 0 and 1)"
     " while receiving response with status: 502 Bad Gateway",
     "UNAVAILABLE: Received http2 header with status: 502",
     "UNAVAILABLE: Received HTTP status code 502"),
    ("502 with an empty body", empty_port,
     "Unavailable: grpc-status header missing, mapped from HTTP status code 502",
     "UNAVAILABLE: Received http2 header with status: 502",
     "UNAVAILABLE: Received HTTP status code 502"),
    ("grpc-status 14", grpc_port,
     "Unavailable: backend is down",
     "UNAVAILABLE: backend is down",
     "UNAVAILABLE: backend is down"),
]:
    print("--", title)
    check("tonic", tonic(port), expected_of_tonic)
    check("grpcio", grpcio(port), expected_of_grpcio)
    check("grpc-js", grpc_js(port), expected_of_grpc_js)
sys.exit(failures > 0)
END
status=0
timeout 300 python/bin/python observe.py "$page_port" "$empty_port" "$grpc_port" || status=$?
case $status in
  0) echo "AS STATED" ;;
  2 | 124) tail -n 5 nginx.log; echo "CANNOT RUN: not started, or too slow"; exit 2 ;;
  *) echo "CHANGED: see the lines above"; exit 1 ;;
esac
