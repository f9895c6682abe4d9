//! Compiles the contract without protoc: protox parses it, and tonic-prost-build writes the Rust code to OUT_DIR.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 7] = [
    "events/v1/event_receiver.proto",
    "inventory/v1/inventory_service.proto",
    "inventory/v1/stock_events.proto",
    "loyalty/v1/loyalty_service.proto",
    "orders/v1/order_events.proto",
    "orders/v1/order_service.proto",
    "relay/v1/relay_admin.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    // protox includes all imports, as server reflection needs them.
    fs::write(out_dir.join("descriptors.bin"), descriptors.encode_to_vec())?;

    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure().bytes(".").compile_fds_with_config(descriptors, config)?;
    Ok(())
}
