//! The process that is attacked, and the caller that is to be served meanwhile.

use std::{net::SocketAddr, time::Duration};

use order_service::MIGRATORS;
use proto::orders::v1::order_service_client::OrderServiceClient;
use testkit::{
    Scratch, TestDatabase, http,
    processes::{Process, free_port, resident_bytes},
};
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};

use super::LIMIT;
use crate::service::order;

const BINARY: &str = env!("CARGO_BIN_EXE_order-service");
/// A caller may be kept waiting so long.
const SOON: Duration = Duration::from_secs(1);
/// So often a caller may be unlucky: the machine may be busy with other tests.
const TRIES: usize = 10;

/// order-service in a process of its own.
pub(super) struct Victim {
    pub(super) address: SocketAddr,
    pub(super) ops: SocketAddr,
    pub(super) process: Process,
    _database: TestDatabase,
    _files: Scratch,
}

impl Victim {
    pub(super) async fn start(flags: &[&str]) -> Self {
        let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
        let files = Scratch::new();
        let [address, events, ops] = [(); 3].map(|()| SocketAddr::from(([127, 0, 0, 1], free_port().unwrap())));
        let url = database.url_as("order_service");
        let [listen, events_listen, ops_listen] = [address, events, ops].map(|address| address.to_string());
        let own = ["serve", "--listen", &listen, "--events-listen", &events_listen, "--ops-listen", &ops_listen];
        let ending = ["--database-url", &url, "--lame-duck-seconds", "0", "--drain-seconds", "1"];
        let arguments = own.iter().chain(&ending).chain(flags);
        let log = files.join("log");
        let environment = [("RUST_LOG", "info")];
        let mut process = Process::spawn("order-service", BINARY.as_ref(), arguments, environment, &log).unwrap();
        process.wait_healthy(address, LIMIT).await.unwrap();
        Self { address, ops, process, _database: database, _files: files }
    }

    /// A connection of its own.
    pub(super) fn connect(&self) -> OrderServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        OrderServiceClient::new(endpoint.connect_lazy())
    }

    /// Asserts that a caller who comes now can connect and place an order within a second, and that operators are answered.
    pub(super) async fn serves_the_next_caller(&self) {
        let mut last = String::new();
        for _ in 0..TRIES {
            match timeout(SOON, self.connect().create_order(order())).await {
                Ok(Ok(_)) => {
                    let alive = timeout(LIMIT, http::get(self.ops, "/livez")).await.expect("an answer to operators");
                    assert_eq!(alive.unwrap().0, 200);
                    return;
                }
                Ok(Err(refused)) => last = refused.to_string(),
                Err(_) => last = format!("no answer within {SOON:?}"),
            }
            sleep(Duration::from_millis(100)).await;
        }
        panic!("none of {TRIES} callers is served: {last}; the log ends in\n{}", self.process.log_tail(5));
    }

    /// Its memory, where that can be known.
    pub(super) fn resident(&self) -> Option<u64> {
        resident_bytes(self.process.pid())
    }

    /// Asserts that it still runs, and ends it.
    pub(super) async fn end(mut self) {
        assert!(self.process.is_running(), "{}", self.process.log_tail(5));
        let exit = self.process.terminate(LIMIT).await.unwrap();
        assert!(exit.status.success() && !exit.killed, "{exit:?}\n{}", self.process.log_tail(5));
    }
}
