use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use testkit::{
    Scratch,
    postgres::{Cluster, Options, can_test_clusters, find},
    processes::Process,
};

const EXISTING: &str = "postgres://nobody:nothing@127.0.0.1:1/postgres";

/// Runs the script with a private cluster, even if the tests themselves use another server.
fn with_postgres(directory: &Path, script: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_harness"))
        .args(["with-postgres", "--", "sh", "-c", script])
        .current_dir(directory)
        .env_remove("POSTGRES_URL")
        .output()
        .unwrap()
}

fn clusters(directory: &Path) -> usize {
    fs::read_dir(directory.join("target")).into_iter().flatten().count()
}

#[test]
fn the_command_gets_a_server_and_its_exit_code_is_returned() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let output = with_postgres(&scratch, "echo $POSTGRES_URL; ls target | wc -l; exit 7");
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.starts_with("postgres://postgres:postgres@127.0.0.1:"), "{stdout}");
    assert!(stdout.trim().ends_with('1'), "{stdout}");
    assert_eq!(clusters(&scratch), 0);

    let output = with_postgres(&scratch, "kill -9 $$");
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    assert_eq!(clusters(&scratch), 0);
}

#[test]
fn an_existing_server_that_does_not_answer_is_named_without_its_password() {
    let output = Command::new(env!("CARGO_BIN_EXE_harness"))
        .args(["with-postgres", "--postgres-url", EXISTING, "--", "true"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.starts_with("error: cannot connect to PostgreSQL at 127.0.0.1:1"), "{stderr}");
    assert!(!stderr.contains("nothing"), "a password in {stderr}");
}

#[test]
fn without_a_command_the_usage_is_wrong() {
    let status = Command::new(env!("CARGO_BIN_EXE_harness")).arg("with-postgres").output().unwrap().status;
    assert_eq!(status.code(), Some(2));
}

/// Writes programs that do what those in `real` do, except that the server claims to be of another version.
fn claim_version(directory: &Path, real: &Path, version: &str) {
    fs::create_dir_all(directory).unwrap();
    for program in ["initdb", "pg_ctl", "postgres"] {
        let claim = format!("[ \"$1\" = --version ] && exec echo 'postgres (PostgreSQL) {version}'");
        let claim = if program == "postgres" { claim.as_str() } else { "" };
        let script = format!("#!/bin/sh\n{claim}\nexec '{}' \"$@\"\n", real.join(program).display());
        let path = directory.join(program);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn with_programs_in(directory: &Path) -> Output {
    let mut harness = Command::new(env!("CARGO_BIN_EXE_harness"));
    harness.args(["with-postgres", "--", "true"]).env("POSTGRES_BIN", directory).env_remove("POSTGRES_URL");
    harness.current_dir(directory.parent().unwrap()).output().unwrap()
}

#[test]
fn the_programs_that_postgres_bin_names_run_the_server() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let directory = scratch.join("bin");
    claim_version(&directory, find().unwrap().directory(), "99.1");
    let output = with_programs_in(&directory);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&format!("PostgreSQL 99 from {}", directory.display())), "{said}");
}

#[test]
fn no_other_programs_are_used_instead_of_those_that_postgres_bin_names() {
    let scratch = Scratch::new();
    let directory = scratch.join("bin");
    let refusal = |reason: &str| {
        let output = with_programs_in(&directory);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("error: ") && said.contains(reason), "{said}");
        assert_eq!(clusters(&scratch), 0);
    };
    refusal(&format!("POSTGRES_BIN is {}, and that is no", directory.display()));
    claim_version(&directory, Path::new("/nowhere"), "13.23");
    refusal(&format!("PostgreSQL 13 in {}, which POSTGRES_BIN names, is too old", directory.display()));
}

/// A harness that runs a command without end.
async fn endless(scratch: &Scratch) -> Process {
    let script = "cd \"$0\" && exec \"$1\" with-postgres --postgres-url '' -- sh -c 'echo ready; exec sleep 60'";
    let arguments = ["-c".as_ref(), script.as_ref(), scratch.as_os_str(), env!("CARGO_BIN_EXE_harness").as_ref()];
    let environment: [(&str, &str); 0] = [];
    let process = Process::spawn("harness", Path::new("sh"), arguments, environment, &scratch.join("log")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    while !process.log().unwrap().contains("ready") {
        assert!(Instant::now() < deadline, "{}", process.log().unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    process
}

#[tokio::test]
async fn signals_reach_the_command() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    for signal in [Signal::TERM, Signal::INT] {
        let mut harness = endless(&scratch).await;
        let exit = harness.stop(signal, Duration::from_secs(40)).await.unwrap();
        assert_eq!(exit.status.code(), Some(128 + signal.as_raw()), "{}", harness.log().unwrap());
        assert_eq!(clusters(&scratch), 0);
        fs::remove_file(scratch.join("log")).unwrap();
    }
}

#[tokio::test]
async fn the_next_run_deletes_the_cluster_of_a_killed_run() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let mut harness = endless(&scratch).await;
    harness.kill().await.unwrap();
    assert_eq!(clusters(&scratch), 1);

    let output = with_postgres(&scratch, "ls target | wc -l");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), "1");
    assert!(String::from_utf8(output.stderr).unwrap().contains("left behind"));
    assert_eq!(clusters(&scratch), 0);
}

#[tokio::test]
async fn a_cluster_can_take_over_the_directory_of_a_killed_run() {
    if !can_test_clusters() {
        return;
    }
    let scratch = Scratch::new();
    let mut harness = endless(&scratch).await;
    harness.kill().await.unwrap();

    let left = fs::read_dir(scratch.join("target")).unwrap().next().unwrap().unwrap().path();
    let cluster =
        Cluster::start(Options { directory: left, port: None, keep: false, durable: true, settings: Vec::new() })
            .await
            .unwrap();
    cluster.stop().await.unwrap();
    assert_eq!(clusters(&scratch), 0);
}
