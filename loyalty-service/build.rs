//! Recompiles when a migration is added: `migrate!` embeds the folder but does not notice new files in it.

fn main() {
    println!("cargo::rerun-if-changed=../migrations/loyalty");
}
