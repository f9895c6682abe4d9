use std::{
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    path::Path,
    time::{Duration, Instant},
};

use testkit::processes::{Process, binary, free_port};

use testkit::Scratch;

const AMPLE: Duration = Duration::from_secs(20);

fn shell(script: &str, scratch: &Scratch) -> Process {
    let log = scratch.join("log");
    Process::spawn("shell", Path::new("sh"), ["-c", script], [("GREETING", "hello")], &log).unwrap()
}

async fn wait_for_log(process: &Process, text: &str) {
    let deadline = Instant::now() + AMPLE;
    while !process.log().unwrap().contains(text) {
        assert!(Instant::now() < deadline, "no {text:?} in {:?}", process.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn terminate_lets_a_process_finish() {
    let scratch = Scratch::new();
    let mut process = shell("trap 'echo bye; exit 7' TERM; echo $GREETING; while :; do sleep 0.01; done", &scratch);
    wait_for_log(&process, "hello").await;
    assert!(process.is_running());

    let exit = process.terminate(AMPLE).await.unwrap();
    assert_eq!((exit.status.code(), exit.killed), (Some(7), false));
    assert!(!process.is_running());
    assert_eq!(process.log().unwrap(), "hello\nbye\n");
    assert_eq!(process.log_tail(1), "bye");
}

#[tokio::test]
async fn terminate_kills_a_process_that_ignores_it() {
    let scratch = Scratch::new();
    let mut process = shell("trap '' TERM; echo up; while :; do sleep 0.01; done", &scratch);
    wait_for_log(&process, "up").await;
    let exit = process.terminate(Duration::from_millis(50)).await.unwrap();
    assert_eq!((exit.status.signal(), exit.killed), (Some(9), true));
}

#[tokio::test]
async fn a_process_that_has_ended_can_still_be_signalled() {
    let scratch = Scratch::new();
    let mut process = shell("exec sleep 1000", &scratch);
    assert_eq!(process.kill().await.unwrap().signal(), Some(9));
    assert_eq!(process.exit_status().unwrap().unwrap().signal(), Some(9));
    assert_eq!(process.terminate(AMPLE).await.unwrap().status.signal(), Some(9));
}

#[tokio::test]
async fn a_dropped_process_is_killed() {
    let scratch = Scratch::new();
    let process = shell("exec sleep 1000", &scratch);
    let pid = rustix::process::Pid::from_raw(process.pid().cast_signed()).unwrap();
    drop(process);
    let deadline = Instant::now() + AMPLE;
    while rustix::process::test_kill_process(pid).is_ok() {
        assert!(Instant::now() < deadline, "it still runs");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_process_that_exits_before_it_is_healthy_shows_its_log() {
    let scratch = Scratch::new();
    let mut process = shell("echo the reason >&2; exit 3", &scratch);
    let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let message = process.wait_healthy(address, AMPLE).await.unwrap_err().to_string();
    assert!(message.contains("exit status: 3") && message.ends_with("the reason"), "{message}");
}

#[tokio::test]
async fn a_process_that_never_becomes_healthy_is_awaited_up_to_the_limit() {
    let scratch = Scratch::new();
    let mut process = shell("exec sleep 1000", &scratch);
    let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let message = process.wait_healthy(address, Duration::from_millis(200)).await.unwrap_err().to_string();
    assert!(message.contains("was not healthy within 200ms"), "{message}");
}

#[tokio::test]
async fn a_server_that_becomes_healthy_ends_the_wait() {
    let scratch = Scratch::new();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));

    let mut process = shell("exec sleep 1000", &scratch);
    let message = process.wait_healthy(address, Duration::from_millis(200)).await.unwrap_err().to_string();
    assert!(message.contains("NOT_SERVING"), "{message}");
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    process.wait_healthy(address, AMPLE).await.unwrap();
}

#[test]
fn a_missing_binary_is_named_with_the_command_that_builds_it() {
    let message = binary("no-such-service").unwrap_err().to_string();
    assert!(message.ends_with("build it with `cargo build -p no-such-service`"), "{message}");
}
