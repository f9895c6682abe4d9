//! The machine and the versions: without them a figure means little.

use std::{fs, process::Command};

use anyhow::Result;
use serde_json::{Map, Value, json};
use sqlx::PgConnection;

/// Server settings that matter here, changed or not.
const SETTINGS: &str = "-- bench: read settings
    SELECT name, current_setting(name) FROM pg_settings
    WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes', 'wal_sync_method', 'wal_level', 'commit_delay',
            'shared_buffers', 'max_wal_size', 'checkpoint_timeout', 'autovacuum', 'jit', 'data_checksums',
            'track_commit_timestamp', 'max_connections')
        OR source = 'command line' AND name NOT IN ('port', 'listen_addresses', 'unix_socket_directories', 'data_directory')
    ORDER BY name";

/// Settings of roles, above all `synchronous_commit` of the relay.
const ROLE_SETTINGS: &str = "-- bench: read settings of roles
    SELECT rolname::text, array_to_string(setconfig, ', ')
    FROM pg_db_role_setting JOIN pg_roles ON pg_roles.oid = setrole
    ORDER BY rolname";

/// Describes the machine, the versions, and the settings of the server.
pub(super) async fn describe(connection: &mut PgConnection) -> Result<Value> {
    let version: String = sqlx::query_scalar("SELECT version()").fetch_one(&mut *connection).await?;
    let settings: Vec<(String, String)> = sqlx::query_as(SETTINGS).fetch_all(&mut *connection).await?;
    let roles: Vec<(String, String)> = sqlx::query_as(ROLE_SETTINGS).fetch_all(connection).await?;
    let [settings, roles] = [settings, roles]
        .map(|pairs| pairs.into_iter().map(|(name, value)| (name, value.into())).collect::<Map<String, Value>>());
    Ok(json!({
        "cores": std::thread::available_parallelism()?.get(),
        "cpu": field("/proc/cpuinfo", "model name", ':'),
        "memory": field("/proc/meminfo", "MemTotal", ':'),
        "system": field("/etc/os-release", "PRETTY_NAME", '='),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "architecture": std::env::consts::ARCH,
        "postgresql": version,
        "commit": output_of("git", &["describe", "--always", "--dirty"]),
        "rustc": output_of("rustc", &["--version"]),
        "harness": env!("CARGO_PKG_VERSION"),
        "settings": settings,
        "roles": roles,
        "services": "default settings, except where a part says otherwise",
    }))
}

/// Reads a field of a Linux file. On other systems it is unknown.
fn field(path: &str, name: &str, separator: char) -> String {
    let content = fs::read_to_string(path).unwrap_or_default();
    let value = content.lines().find_map(|line| {
        let (key, value) = line.split_once(separator)?;
        (key.trim() == name).then(|| value.trim().trim_matches('"').to_owned())
    });
    value.unwrap_or_else(|| "unknown".into())
}

/// The output of a program, if it is installed. `make bench` has just built this commit with this compiler.
fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success());
    output.map_or_else(|| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
