//! The command line.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use testkit::{Scratch, processes::binary};

#[test]
fn the_harness_is_found_beside_the_tests() {
    assert_eq!(binary("harness").unwrap(), Path::new(env!("CARGO_BIN_EXE_harness")));
}

/// Beside the harness, in a folder of the test's, stands a script in the place of the program.
#[test]
fn chaos_and_bench_get_the_arguments_and_give_the_exit_code() {
    let scratch = Scratch::new();
    let harness = scratch.join("harness");
    fs::copy(env!("CARGO_BIN_EXE_harness"), &harness).unwrap();
    for program in ["chaos", "bench"] {
        let missing = Command::new(&harness).args([program, "--seed", "7"]).output().unwrap();
        let stderr = String::from_utf8(missing.stderr).unwrap();
        assert_eq!(missing.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(&format!("-p {program}`")), "{stderr}");

        let script = scratch.join(program);
        fs::write(&script, "#!/bin/sh\necho \"$@\"\nexit 7\n").unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        for arguments in [&["--seed", "7"][..], &["--help"], &["noop", "--nonsense"]] {
            let output = Command::new(&harness).arg(program).args(arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(7), "{output:?}");
            assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), arguments.join(" "));
        }
    }
}
