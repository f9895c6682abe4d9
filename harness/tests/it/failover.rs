//! The databases fail over.

use std::{fs, process::Command};

use testkit::{
    Scratch,
    postgres::{can_test_clusters, find},
    processes::binary,
};

/// One crash, to see the whole command work. Its times mean nothing beside other tests, so a target of time may be missed
/// here.
#[test]
fn a_crash_and_the_promotion_of_the_standby_lose_nothing_and_leave_nothing_running() {
    // Small builds of PostgreSQL lack it, and that of another version does not understand their files.
    let can_rewind = find().is_ok_and(|installation| installation.program("pg_rewind").is_file());
    if !can_test_clusters() || !can_rewind || !has("haproxy") {
        eprintln!("skipped: needs a PostgreSQL of this machine with pg_rewind, POSTGRES_URL and haproxy");
        return;
    }
    let scratch = Scratch::new();
    let mut harness = Command::new(binary("harness").unwrap());
    harness.args(["failover", "--standby", "--crashes", "1", "--switchovers", "0", "--seed", "1"]);
    let output = harness.args(["--minutes-at-most", "5"]).current_dir(&*scratch).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let last = stdout.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("failover: kind=standby connect=haproxy seed=1 switchovers=0 crashes=1 "),
        "{stdout}{stderr}"
    );
    assert!(last.contains(" lost=0 doubled=0 findings=0 "), "{stdout}{stderr}");
    let target_missed = stdout.contains("MISSED");
    assert_eq!(output.status.code(), Some(i32::from(target_missed)), "{stdout}{stderr}");
    let left = scratch.join("target/failover");
    assert!(!left.join("cluster").exists(), "the cluster's directory is left");
    assert!(left.join("logs/a.log").exists());
    assert_eq!(command_lines_with(&left.display().to_string()), Vec::<String>::new());
}

fn has(program: &str) -> bool {
    ["/usr/sbin", "/usr/local/sbin", "/usr/bin"]
        .iter()
        .any(|directory| fs::exists(format!("{directory}/{program}")).unwrap())
}

fn command_lines_with(text: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).filter(|line| line.contains(text)).collect()
}
