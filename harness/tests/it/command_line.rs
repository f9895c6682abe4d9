//! The command line.

use std::{path::Path, process::Command};

use testkit::processes::binary;

#[test]
fn the_harness_is_found_beside_the_tests() {
    assert_eq!(binary("harness").unwrap(), Path::new(env!("CARGO_BIN_EXE_harness")));
}

/// The help, the arguments and the exit code are those of the program.
#[test]
fn chaos_and_bench_are_programs_of_their_own() {
    for (program, help) in [("chaos", "--seed"), ("bench", "--only")] {
        let run = |argument| Command::new(env!("CARGO_BIN_EXE_harness")).args([program, argument]).output().unwrap();
        let output = run("--help");
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(stdout.contains(help), "{stdout}");
        let output = run("--nonsense");
        assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
