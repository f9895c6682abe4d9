//! Recompiles when a migration is added: `migrate!` embeds the folder, but Cargo does not see new files in it.

fn main() {
    println!("cargo::rerun-if-changed=../migrations/outbox");
}
