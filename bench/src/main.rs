//! `harness bench`: measures the system against what PostgreSQL and gRPC alone can do on the same machine.
//!
//! Most figures are ratios of the system to something simpler that does the same work. Both are measured in the same
//! run, on the same private cluster with `fsync` and `synchronous_commit` on. They alternate for at least three rounds,
//! and the median counts. So a figure means something on any machine, also on a busy one. Each part is a module:
//!
//! 1. `create_order`: orders per second, against pgbench and against an upper bound.
//! 2. `drain`: a backlog through the relay into inventory-service.
//! 3. `latency`: from accepted to reserved stock and to CONFIRMED, at constant rates.
//! 4. `hot_sku`: one SKU that every order needs.
//! 5. `lease`: the time of a lease, with different contents of the outbox.
//! 6. `soak`: ten minutes at one rate, only on request.
//! 7. `secure`: mutual TLS and a policy against neither, only on request.
//! 8. `overload`: three times as many orders as can be placed, only on request.
//!
//! The system under test is the real binaries with their default settings. Each part has databases of its own. Every
//! answer is checked, every part that places orders ends with an audit, and a run with any error does not count.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use report::Report;
use serde_json::{Map, Value};
use site::Site;

use harness::interrupt::unless_interrupted;

mod backlog;
mod closed_loop;
mod commit_times;
mod create_order;
mod drain;
mod grouped_inserts;
mod hot_sku;
mod latency;
mod lease;
mod machine;
mod noop;
mod open_loop;
mod overload;
mod pgbench;
mod plot;
mod processors;
mod quantiles;
mod report;
mod requests;
mod secure;
mod site;
mod soak;
mod statement_log;
mod stub_receiver;

/// The allocator of the services, so that the comparison is fair.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const DIRECTORY: &str = "target/bench";
/// All parts that run without being asked for.
const PARTS: [u8; 5] = [1, 2, 3, 4, 5];
/// The others, with the files of their summaries.
const ON_REQUEST: [(u8, &str); 3] = [(6, "soak.json"), (7, "secure.json"), (8, "overload.json")];

/// Measure the system against what PostgreSQL and gRPC alone can do on this machine
///
/// Takes up to 15 minutes, on a machine that does nothing else. Starts a private PostgreSQL with durable commits
/// (POSTGRES_URL is not used) and the real binaries. Prints a table for each part, and at the end all figures with
/// their targets. Writes target/bench/summary.json, with plots (SVG) beside it.
///
/// Exits with 1 if the run does not count: a call failed, an audit found something, there was a deadlock, or a figure
/// could not be measured. A missed target is no failure.
///
/// Parts: 1 CreateOrder against pgbench; 2 drain of a backlog; 3 latency at constant rates; 4 one hot SKU; 5 lease
/// time. Only with --only, and with a summary of its own (soak.json, secure.json, overload.json): 6 ten minutes at a
/// constant rate; 7 mutual TLS and a policy against neither; 8 three times as many orders as can be placed.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 success, 1 failure, 2 wrong arguments.")]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    /// Run only this part
    #[arg(long, value_name = "PART", value_parser = clap::value_parser!(u8).range(1..=8))]
    only: Option<u8>,
    /// Run one round with small sizes, to see that everything works. A part takes a minute; the figures mean little
    #[arg(long)]
    quick: bool,
}

/// A program that the bench itself starts.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Noop(noop::Arguments),
}

/// On one thread, for two reasons: the load generator must leave the processors to the system under test, and `noop`
/// must run as the services do.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = chassis::parse::<Arguments>();
    let outcome = match &arguments.part {
        Some(Part::Noop(noop)) => noop::run(noop).await,
        None => {
            let measuring =
                async { Ok(if measure(&arguments).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }) };
            unless_interrupted(Box::pin(measuring)).await
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Returns whether the run counts.
async fn measure(arguments: &Arguments) -> Result<bool> {
    let directory = std::path::absolute(DIRECTORY)?;
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let began = Instant::now();
    println!("bench: starting PostgreSQL");
    let site = Site::start(&directory, arguments.quick).await?;
    // Processes append to their logs. Only now it is certain that no other bench runs in this directory.
    let _ = fs::remove_dir_all(directory.join("logs"));
    let machine = site.describe().await?;
    print_machine(&machine);

    let mut report = Report::default();
    let parts = arguments.only.map_or_else(|| PARTS.to_vec(), |part| vec![part]);
    for part in &parts {
        let part_began = Instant::now();
        if let Err(error) = run_part(*part, &site, &mut report).await {
            report.invalidate(format!("part {part}: {error:#}"));
        }
        println!("bench: {part}  took {}", minutes(part_began.elapsed()));
    }
    report.deadlocked(site.count_deadlocks().await?);
    site.stop().await?;
    let counts = report.conclude(&parts);
    report.print();
    // These do not overwrite the summary of the other parts.
    let own = ON_REQUEST.iter().find(|(part, _)| parts == [*part]);
    let summary = Path::new(DIRECTORY).join(own.map_or("summary.json", |(_, file)| file));
    report.write(&summary, &machine, arguments.quick)?;
    let verdict = if counts { "the run counts" } else { "the run does NOT count: see INVALID above" };
    if arguments.quick {
        println!("bench: this was a quick run with small sizes and one round: the figures mean little");
    }
    println!("bench: {verdict}; {} in all; {} and plots beside it", minutes(began.elapsed()), summary.display());
    Ok(counts)
}

async fn run_part(part: u8, site: &Site, report: &mut Report) -> Result<()> {
    match part {
        1 => create_order::run(site, report).await,
        2 => drain::run(site, report).await,
        3 => latency::run(site, report).await,
        4 => hot_sku::run(site, report).await,
        5 => lease::run(site, report).await,
        6 => soak::run(site, report).await,
        7 => secure::run(site, report).await,
        _ => overload::run(site, report).await,
    }
}

fn print_machine(machine: &Value) {
    println!();
    for (name, value) in machine.as_object().into_iter().flatten() {
        let value = value.as_object().map_or_else(|| text(value), list);
        println!("  {name:<14}{value}");
    }
    println!();
}

fn list(values: &Map<String, Value>) -> String {
    let values: Vec<String> = values.iter().map(|(name, value)| format!("{name}: {}", text(value))).collect();
    values.join("; ")
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn minutes(time: Duration) -> String {
    format!("{} min {:02} s", time.as_secs() / 60, time.as_secs() % 60)
}
