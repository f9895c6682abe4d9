//! What the service does with certificates, and without them.

use std::{io::ErrorKind, net::SocketAddr, path::Path};

use chassis::{RunError, Tls, TlsFiles, connect_lazily};
use order_service::MIGRATORS;
use proto::orders::v1::order_service_client::OrderServiceClient;
use testkit::{
    Scratch, TestDatabase,
    certificates::{Authority, replace},
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::service::{LIMIT, eventually, order, settings, sockets};

async fn refused(sockets: [TcpListener; 2], flags: &[&str]) -> String {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let run = order_service::run(sockets, settings(&database, flags), CancellationToken::new());
    match timeout(LIMIT, run).await.expect("an end").unwrap_err() {
        RunError::Tls(error) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn write(file: &Path, text: &str) -> String {
    replace(file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn without_tls_other_machines_are_served_only_if_that_is_said() {
    let open = async || TcpListener::bind("0.0.0.0:0").await.unwrap();
    let [api, events] = sockets().await;
    let (of_callers, of_relays) = ([open().await, events], [api, open().await]);
    for (sockets, flags) in [(of_callers, &[][..]), (of_relays, &[]), (sockets().await, &["--ops-listen", "0.0.0.0:1"])]
    {
        let error = refused(sockets, flags).await;
        assert!(error.starts_with("0.0.0.0:") && error.contains("--allow-plaintext"), "{error}");
    }

    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let (sockets, shutdown) = ([open().await, open().await], CancellationToken::new());
    let address = SocketAddr::from(([127, 0, 0, 1], sockets[0].local_addr().unwrap().port()));
    let settings = settings(&database, &["--allow-plaintext"]);
    let running = tokio::spawn(order_service::run(sockets, settings, shutdown.clone()));
    let mut orders = OrderServiceClient::connect(format!("http://{address}")).await.unwrap();
    timeout(LIMIT, orders.create_order(order())).await.expect("an answer").unwrap();
    shutdown.cancel();
    timeout(LIMIT, running).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_refused_with_the_file_and_what_is_wrong() {
    let (scratch, authority) = (Scratch::new(), Authority::new().unwrap());
    let own = write(&scratch.join("own.pem"), &authority.sign(&["localhost"]).unwrap());
    let other = write(&scratch.join("other.pem"), &authority.sign(&["localhost"]).unwrap());
    let empty = write(&scratch.join("empty.pem"), "");
    let ca = write(&scratch.join("ca.pem"), authority.pem());
    let policy = write(&scratch.join("policy"), "gateway CreateOrder\nrelay\n");
    let missing = scratch.join("missing.pem").to_str().unwrap().to_owned();
    for (flags, file, says) in [
        (vec!["--tls-cert-file", &missing], &missing, "No such file"),
        (vec!["--tls-cert-file", &empty, "--tls-key-file", &own], &empty, "it holds no certificate in PEM"),
        (vec!["--tls-cert-file", &own, "--tls-key-file", &ca], &ca, "it holds no private key in PEM"),
        (
            vec!["--tls-cert-file", &own, "--tls-key-file", &other],
            &format!("{own} with the key in {other}"),
            "KeyMismatch",
        ),
        (vec!["--tls-cert-file", &own, "--tls-ca-file", &empty], &empty, "it holds no certificate in PEM"),
        (
            vec!["--tls-cert-file", &own, "--tls-ca-file", &ca, "--policy-file", &policy],
            &policy,
            "line 1: \"CreateOrder\" is neither a method (package.Service/Method or package.Service/*) nor source=NAME; \
             line 2: the name needs methods",
        ),
    ] {
        let error = refused(sockets().await, &flags).await;
        assert!(error.starts_with(&format!("cannot use {file}: ")) && error.contains(says), "{flags:?}: {error}");
    }
}

#[tokio::test]
async fn a_policy_needs_certificates_by_which_callers_are_known() {
    let scratch = Scratch::new();
    let policy = write(&scratch.join("policy"), "gateway orders.v1.OrderService/*\n");
    let error = refused(sockets().await, &["--policy-file", &policy]).await;
    assert!(error.starts_with("--policy-file needs --tls-cert-file and --tls-ca-file"), "{error}");
}

struct Served {
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), RunError>>,
    orders: OrderServiceClient<Channel>,
    address: SocketAddr,
    database: TestDatabase,
}

/// With a certificate of its own, and without CAs.
async fn serve(scratch: &Scratch, authority: &Authority) -> Served {
    let own = write(&scratch.join("own.pem"), &authority.sign(&["localhost"]).unwrap());
    let ca = scratch.join("ca.pem");
    write(&ca, authority.pem());
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let (sockets, shutdown) = (sockets().await, CancellationToken::new());
    let address = sockets[0].local_addr().unwrap();
    let settings = settings(&database, &["--tls-cert-file", &own]);
    let running = tokio::spawn(order_service::run(sockets, settings, shutdown.clone()));
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", address.port())).unwrap();
    let files = TlsFiles { tls_ca_file: Some(ca), ..TlsFiles::default() };
    let orders = OrderServiceClient::new(connect_lazily(&endpoint, &Tls::read(&files).unwrap()));
    Served { shutdown, running, orders, address, database }
}

/// The oldest ones have to make room, before their time for a handshake is over.
#[tokio::test]
async fn connections_that_say_nothing_make_room_for_callers() {
    let (scratch, authority) = (Scratch::new(), Authority::new().unwrap());
    let Served { shutdown, running, mut orders, address, database: _database } = serve(&scratch, &authority).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    timeout(LIMIT, orders.create_order(order())).await.expect("an answer").unwrap();
    let closed = timeout(LIMIT, silent[0].read(&mut [0])).await.expect("room was made");
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    // Its time for a handshake would have closed this one, too.
    assert_eq!(silent[299].try_read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    shutdown.cancel();
    timeout(LIMIT, running).await.expect("it ends").unwrap().unwrap();
}

/// As without TLS: who comes late is told at once, and does not wait for the drain.
#[tokio::test]
async fn the_door_is_closed_once_the_end_has_begun() {
    let (scratch, authority) = (Scratch::new(), Authority::new().unwrap());
    let Served { shutdown, running, mut orders, address, database } = serve(&scratch, &authority).await;
    orders.create_order(order()).await.unwrap();
    let pool = database.pool().await;
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE orders").execute(&mut *lock).await.unwrap();
    let call = tokio::spawn(async move { orders.create_order(order()).await });
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = 'order_service' AND wait_event_type = 'Lock'";
    let waiting = async || sqlx::query_scalar::<_, i64>(waits).fetch_one(&pool).await.unwrap() == 1;
    eventually("the call waits for the lock", waiting).await;
    shutdown.cancel();
    eventually("no more connections are accepted", async || TcpStream::connect(address).await.is_err()).await;
    assert!(!call.is_finished());
    lock.rollback().await.unwrap();
    call.await.unwrap().unwrap();
    timeout(LIMIT, running).await.expect("it ends").unwrap().unwrap();
    pool.close().await;
}
