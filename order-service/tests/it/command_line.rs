//! The order-service binary.

use std::{net::SocketAddr, path::Path, process::Output, time::Duration};

use order_service::MIGRATORS;
use testkit::{TestDatabase, processes::Process};
use tokio::process::Command;
use uuid::Uuid;

use crate::service::{ONE_ORDER, Service, eventually, order};

const BINARY: &str = env!("CARGO_BIN_EXE_order-service");

/// The binary with these arguments and an empty environment.
pub(crate) fn order_service(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments).env_clear().kill_on_drop(true);
    command
}

pub(crate) async fn run(arguments: &[&str]) -> Output {
    order_service(arguments).output().await.unwrap()
}

/// One line on stderr, nothing on stdout, exit code 2.
fn refused_in_one_line(output: Output) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(output.stdout.is_empty());
    stderr
}

#[tokio::test]
async fn two_processes_may_migrate_at_once() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let url = database.url_as("orders_owner");
    let arguments = ["migrate", "--database-url", &url];
    let (one, other) = tokio::join!(run(&arguments), run(&arguments));
    for output in [one, other] {
        assert!(output.status.success(), "{output:?}");
    }
    let service = Service::start_on(database, &[]).await;
    service.place(order()).await;
    assert_eq!(service.written().await, ONE_ORDER);
    service.end().await;
}

#[tokio::test]
async fn a_bad_value_is_one_line_and_exit_code_2() {
    let url = "postgres://order_service@127.0.0.1/orders";
    for (arguments, named) in [
        (["serve", "--listen", "nowhere", "--database-url", url], "--listen"),
        (["serve", "--drain-seconds", "0", "--database-url", url], "--drain-seconds"),
        (["serve", "--database-connections", "many", "--database-url", url], "--database-connections"),
        (["migrate", "--no-such-flag", "1", "--database-url", url], "--no-such-flag"),
    ] {
        let stderr = refused_in_one_line(run(&arguments).await);
        assert!(stderr.contains(named), "{named} in {stderr}");
    }
    let of_environment = order_service(&["serve", "--database-url", url]).env("REQUEST_SECONDS", "soon").output().await;
    assert!(refused_in_one_line(of_environment.unwrap()).contains("--request-seconds"));
    assert!(refused_in_one_line(run(&["serve"]).await).contains("--database-url"));
}

#[tokio::test]
async fn a_bad_database_url_is_refused_without_its_password() {
    for url in [
        "mysql://ann:s3cret@127.0.0.1/orders",
        "postgres://ann:s3cret@127.0.0.1:port/orders",
        "postgres:ann:s3cret@127.0.0.1/orders",
        "host=127.0.0.1 password=s3cret",
    ] {
        let by_flag = run(&["serve", "--database-url", url]).await;
        let by_variable = order_service(&["migrate"]).env("ORDERS_DATABASE_URL", url).output().await.unwrap();
        for output in [by_flag, by_variable] {
            let stderr = refused_in_one_line(output);
            assert!(stderr.contains("--database-url") && !stderr.contains("s3cret"), "{stderr}");
        }
    }
}

#[tokio::test]
async fn a_database_that_cannot_be_migrated_is_named_without_the_password() {
    let database = TestDatabase::create("orders_owner", &[]).await;
    let url = database.url_as("orders_owner").replace("orders_owner:orders_owner", "nobody_at_all:s3cret");
    let output = run(&["migrate", "--database-url", &url]).await;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(database.name()), "{stderr}");
    assert!(!stderr.contains("s3cret") && !stdout.contains("s3cret"), "{stdout}{stderr}");
}

#[tokio::test]
async fn the_process_serves_reports_its_health_and_ends_on_sigterm() {
    let database = TestDatabase::create("orders_owner", &MIGRATORS).await;
    let url = database.url_as("order_service");
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("order-service-{}.log", Uuid::new_v4()));
    let anywhere = "127.0.0.1:0";
    let arguments = ["serve", "--listen", anywhere, "--events-listen", anywhere, "--lame-duck-seconds", "0"];
    let arguments = arguments.into_iter().chain(["--database-url", &url]);
    let mut process =
        Process::spawn("order-service", BINARY.as_ref(), arguments, [("RUST_LOG", "info")], &log).unwrap();
    let mut listening = None;
    eventually("the process listens", async || {
        listening = address(&process.log().unwrap());
        listening.is_some()
    })
    .await;
    let listening = listening.unwrap();
    process.wait_healthy(listening, Duration::from_secs(5)).await.unwrap();
    let asks = ["healthcheck", "--listen", &listening.to_string()];
    assert!(run(&asks).await.status.success());

    let exit = process.terminate(Duration::from_secs(5)).await.unwrap();
    assert!(exit.status.success() && !exit.killed, "{exit:?}\n{}", process.log_tail(20));
    let logged = process.log().unwrap();
    assert!(!logged.contains("order_service:order_service"), "the password in {logged}");
    assert_eq!(run(&asks).await.status.code(), Some(1));
    std::fs::remove_file(log).unwrap();
}

fn address(log: &str) -> Option<SocketAddr> {
    log.split_once("listening on ")?.1.split_once('"')?.0.parse().ok()
}
