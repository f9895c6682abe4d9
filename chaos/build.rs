//! Lists the named statements in the sources of the services, the relay and `outbox`: a process can be crashed at each.

use std::{collections::BTreeSet, env, error::Error, fs, io, path::Path};

/// The crates whose statements the processes under test execute.
const CRATES: [&str; 5] = ["inventory-service", "loyalty-service", "order-service", "outbox", "outbox-relay"];

fn main() -> Result<(), Box<dyn Error>> {
    let workspace = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("..");
    let mut statements = BTreeSet::new();
    for name in CRATES {
        let sources = workspace.join(name).join("src");
        println!("cargo::rerun-if-changed={}", sources.display());
        let names = read_names(&sources)?;
        if names.is_empty() {
            return Err(format!("no statement in {} begins with its name", sources.display()).into());
        }
        statements.extend(names.into_iter().map(|statement| (name, statement)));
    }
    let list: Vec<_> = statements.into_iter().collect();
    fs::write(Path::new(&env::var("OUT_DIR")?).join("statements.rs"), format!("&{list:?}"))?;
    Ok(())
}

/// The names of the statements in the Rust files of a directory. A statement is a string that begins with `-- owner:
/// name`.
fn read_names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            names.extend(read_names(&path)?);
        } else {
            let source = fs::read_to_string(&path)?;
            let named = source.split("\"-- ").skip(1).filter_map(|rest| rest.split(['\n', '\\', '"']).next());
            names.extend(named.map(str::to_owned));
        }
    }
    Ok(names)
}
