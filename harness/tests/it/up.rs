//! `harness up`, with ports of its own and a private cluster.

use std::{
    net::{Ipv4Addr, TcpListener},
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use testkit::{
    Scratch,
    http::{get, sum_metric},
    postgres::can_test_clusters,
    processes::Process,
};
use tokio::{process::Command, time::sleep};

const LIMIT: Duration = Duration::from_secs(90);

/// The first of six free ports, of which the ports for operators are free too, 1000 later. They are between those that other
/// tests use and those of outgoing connections. Each test looks for them `from` another one.
fn six_free_ports(from: u16) -> u16 {
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let mut firsts = (from..from + 30).step_by(6);
    let ports = |first: &u16| (*first..first + 6).chain(first + 1000..first + 1006).chain(first + 2000..first + 2006);
    firsts.find(|first| ports(first).all(is_free)).expect("free ports")
}

async fn wait_for_log(process: &mut Process, text: &str) {
    let started = Instant::now();
    while !process.log().unwrap().contains(text) {
        assert!(process.is_running() && started.elapsed() < LIMIT, "no {text:?} in {}", process.log().unwrap());
        sleep(Duration::from_millis(20)).await;
    }
}

fn start(scratch: &Scratch, flags: &[&str]) -> Process {
    let mut harness = Command::new(env!("CARGO_BIN_EXE_harness"));
    harness.arg("up").args(flags).current_dir(&**scratch);
    harness.env_remove("POSTGRES_URL").env_remove("POSTGRES_PORT");
    Process::spawn_command("harness", harness, &scratch.join("log")).unwrap()
}

/// The commands that put load on the system and audit it, as they are.
async fn run_what_is_printed(scratch: &Scratch, log: &str) {
    let printed = |text| log.lines().find(|line| line.contains(text)).unwrap();
    let mut script = log.lines().filter(|line| line.contains("export ")).collect::<Vec<_>>().join("\n");
    script += &format!("\n{}\n{}", printed(" stress ").replace("5000", "50"), printed("harness audit"));
    let commands = Command::new("sh").args(["-ec", &script]).current_dir(&**scratch).output().await.unwrap();
    let [output, errors] = [commands.stdout, commands.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(commands.status.success() && output.contains("audit: 50 orders"), "{script}: {output}{errors}");
    assert!(output.contains("audit: loyalty: 50 orders awarded"), "{output}");
}

#[tokio::test]
async fn with_certificates_what_is_printed_works_too() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let mut up = start(&scratch, &["--secure", "--ports-from", &six_free_ports(30_730).to_string()]);
    wait_for_log(&mut up, "Ctrl-C ends everything").await;
    let log = up.log().unwrap();
    assert!(
        log.contains("grpcurl -cacert target/up/ca.pem -cert target/up/customers.pem") && !log.contains("-plaintext")
    );
    assert!(log.contains("export ORDER_SERVICE_URL='https://") && log.contains("export TLS_CA_FILE="), "{log}");
    run_what_is_printed(&scratch, &log).await;
    let exit = up.stop(Signal::INT, LIMIT).await.unwrap();
    assert!(exit.status.success() && !exit.killed, "{}", up.log().unwrap());
}

#[tokio::test]
async fn up_waits_for_a_taken_port_and_says_where_it_is() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let first = six_free_ports(30_700);
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, first + 1)).unwrap();
    let mut up = start(&scratch, &["--ports-from", &first.to_string()]);

    wait_for_log(&mut up, &format!("port {} for inventory-service is taken by ", first + 1)).await;
    if Path::new("/proc/net/tcp").exists() {
        wait_for_log(&mut up, &format!(" (pid {}); waiting up to 75 s", std::process::id())).await;
    }
    drop(taken);
    wait_for_log(&mut up, "Ctrl-C ends everything").await;
    let log = up.log().unwrap();
    let names =
        ["order-service", "inventory-service", "orders-relay", "inventory-relay", "loyalty-service", "PostgreSQL"];
    for (name, port) in names.into_iter().zip(first..) {
        assert!(log.contains(&format!("up: {name:<18} 127.0.0.1:{port}")), "{log}");
    }

    run_what_is_printed(&scratch, &log).await;
    for (port, metric) in
        [(first + 1000, "orders_total"), (first + 1001, "inbox_events_total"), (first + 2, "outbox_events")]
    {
        // A relay on a busy machine measures the outbox some seconds later.
        let started = Instant::now();
        let mut page = String::new();
        while !page.contains(metric) {
            assert!(started.elapsed() < LIMIT, "no {metric} at {port}: {page}");
            sleep(Duration::from_millis(20)).await;
            page = get(([127, 0, 0, 1], port).into(), "/metrics").await.unwrap().1;
        }
        let rejected = sum_metric(&page, "order_settled_seconds_count", &[("outcome", "rejected")]);
        assert_eq!(rejected, (metric == "orders_total").then_some(0), "there before the first: {page}");
    }

    let exit = up.stop(Signal::INT, LIMIT).await.unwrap();
    assert!(exit.status.success() && !exit.killed, "{}", up.log().unwrap());
}
