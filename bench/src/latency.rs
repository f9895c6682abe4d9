//! Part 3: how long an order takes through the whole system, at constant rates.
//!
//! Orders are placed when they are due (see [`super::open_loop`]). All are timed by the commit timestamps of the
//! databases (see [`super::commit_times`]). The time from due to stock compares the clock of the caller with that of
//! the database, which are on the same machine.
//!
//! A search finds the highest rate. A rate passes if the p99 from due to stock is below [`BOUND_MS`] and the achieved
//! rate is close to the offered one, by the median of three runs. The rate is doubled until it fails, then narrowed
//! down.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    commit_times,
    open_loop::{self, DatabaseClock, Schedule},
    plot,
    quantiles::{Latencies, P50, P99, P99_9, median},
    report::{Report, Table, number},
    requests::Shape,
    site::{Site, finish, start},
};
use harness::{stress::wait_until_delivered, system::Layout};

const RATES: [u32; 3] = [300, 3000, 10_000];
/// The rate that the figures are about.
const RATE_OF_FIGURES: u32 = 3000;
const FIRST_STEP: u32 = 1000;
const LAST_STEP: u32 = 32_000;
const BOUND_MS: f64 = 100.0;
const ACHIEVED_AT_LEAST: f64 = 0.98;
/// The pause before the check whether all events are delivered, since that check takes processor time.
const PAUSE: Duration = Duration::from_millis(300);
const DRAIN_LIMIT: Duration = Duration::from_secs(120);

/// The measurements of a schedule. Latencies are in milliseconds.
pub(super) struct Measured {
    pub(super) achieved: f64,
    pub(super) unsent: u32,
    due_to_acknowledged: Latencies,
    due_to_stock: Latencies,
    pub(super) to_stock: Latencies,
    pub(super) to_confirmed: Latencies,
}

impl Measured {
    fn spans(&self) -> [(&'static str, &Latencies); 4] {
        [
            ("accept to stock", &self.to_stock),
            ("accept to CONFIRMED", &self.to_confirmed),
            ("due to acknowledged", &self.due_to_acknowledged),
            ("due to stock", &self.due_to_stock),
        ]
    }
}

/// Measures, prints and plots.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let layout = site.databases("latency").await?;
    let processes = start(&layout, &layout.services()).await?;
    Shape::USUAL.add_stock(&layout.target()?).await?;
    let warm_up = Schedule { rate: 300, time: Duration::from_secs(1) };
    measure(&layout, warm_up, "warm-up", report).await?;

    let time = Duration::from_secs(site.size(8, 2));
    let mut measured: BTreeMap<u32, Vec<Measured>> = BTreeMap::new();
    for round in 1..=site.rounds() {
        println!("bench: 3  round {round}");
        site.checkpoint().await?;
        for rate in RATES {
            let run = measure(&layout, Schedule { rate, time }, "3", report).await?;
            measured.entry(rate).or_default().push(run);
        }
    }
    report_figures(&measured, report);
    for (rate, runs) in &measured {
        let achieved = median(&runs.iter().map(|run| run.achieved).collect::<Vec<_>>());
        if achieved < ACHIEVED_AT_LEAST * f64::from(*rate) {
            println!(
                "  {rate} orders/s are too many for this machine: their latencies are those of an overloaded system"
            );
        }
    }
    if let Some(runs) = measured.get(&RATE_OF_FIGURES) {
        plot::latencies(site.directory(), runs)?;
    }
    let highest = find_highest(site, &layout, report).await?;
    println!(
        "\n  highest rate with a p99 from due to stock under {BOUND_MS} ms: {} orders/s\n",
        number(highest.into())
    );
    report.figure("max_rate_p99_100ms", highest.into());
    finish(&layout, processes, report).await
}

/// Places the orders of a schedule, and waits until all of them are settled.
pub(super) async fn measure(layout: &Layout, schedule: Schedule, part: &str, report: &mut Report) -> Result<Measured> {
    let databases = layout.target()?.databases;
    let clock = DatabaseClock::read(&mut databases.orders().await?).await?;
    let offered = open_loop::offer(layout.order_service, schedule, Shape::USUAL).await?;
    sleep(PAUSE).await;
    wait_until_delivered(&databases, DRAIN_LIMIT).await?;
    let committed = commit_times::read(&databases, clock.at(offered.began)).await?;

    report.failed(&format!("{} orders/s", schedule.rate), &offered.failures);
    let [mut due_to_stock, mut to_stock, mut to_confirmed] = [const { Vec::new() }; 3];
    let mut unsettled = 0;
    for order in &offered.orders {
        let Some(times) = committed.get(&order.order_id) else {
            unsettled += 1;
            continue;
        };
        let milliseconds = |from: i64, to: i64| (to - from) as f64 / 1e3;
        due_to_stock.push(milliseconds(clock.at(order.due), times.stocked));
        to_stock.push(milliseconds(times.accepted, times.stocked));
        to_confirmed.push(milliseconds(times.accepted, times.confirmed));
    }
    if unsettled > 0 {
        report.wrong(&format!("{unsettled} orders were acknowledged and are not CONFIRMED"), unsettled);
    }
    let measured = Measured {
        achieved: offered.achieved(schedule),
        unsent: offered.unsent,
        due_to_acknowledged: offered.acknowledgements(schedule),
        due_to_stock: Latencies::of(due_to_stock),
        to_stock: Latencies::of(to_stock),
        to_confirmed: Latencies::of(to_confirmed),
    };
    let [stock, confirmed] = [&measured.to_stock, &measured.to_confirmed]
        .map(|latencies| format!("{} / {}", number(latencies.at(P50)), number(latencies.at(P99))));
    println!(
        "bench: {part}  {:>6}/s offered, {:>6}/s achieved; p50 / p99 ms: stock {stock}, CONFIRMED {confirmed}",
        schedule.rate,
        number(measured.achieved),
    );
    Ok(measured)
}

fn report_figures(measured: &BTreeMap<u32, Vec<Measured>>, report: &mut Report) {
    let header = ["orders/s", "achieved", "not sent", "", "p50 ms", "p99 ms", "p99.9 ms"];
    let mut table = Table::new("3. Latency, open loop (medians over the rounds)", &header);
    let mut raw = Vec::new();
    for (rate, runs) in measured {
        let achieved = median(&runs.iter().map(|run| run.achieved).collect::<Vec<_>>());
        let unsent: u32 = runs.iter().map(|run| run.unsent).sum();
        for span in 0..4 {
            let quantiles = [P50, P99, P99_9].map(|quantile| {
                let of_rounds: Vec<f64> = runs.iter().map(|run| run.spans()[span].1.at(quantile)).collect();
                (median(&of_rounds), of_rounds)
            });
            let name = runs.first().map_or("", |run| run.spans()[span].0);
            let [p50, p99, p99_9] = &quantiles;
            let cells =
                [f64::from(*rate), achieved, f64::from(unsent)].map(number).into_iter().chain([name.to_owned()]);
            table.row(cells.chain(quantiles.iter().map(|(median, _)| number(*median))));
            raw.push(json!({
                "rate": rate, "span": name, "p50_ms": p50.1, "p99_ms": p99.1, "p99_9_ms": p99_9.1,
                "achieved": runs.iter().map(|run| run.achieved).collect::<Vec<_>>(), "unsent": unsent,
            }));
            if *rate == RATE_OF_FIGURES && span < 2 {
                let keys =
                    [["stock_p50_ms_3000", "stock_p99_ms_3000"], ["confirmed_p50_ms_3000", "confirmed_p99_ms_3000"]];
                report.figure(keys[span][0], p50.0);
                report.figure(keys[span][1], p99.0);
            }
        }
    }
    table.print();
    report.raw("latency", raw.into());
}

/// Returns 0 if not even the first rate passes.
async fn find_highest(site: &Site, layout: &Layout, report: &mut Report) -> Result<u32> {
    let time = Duration::from_secs(site.size(5, 2));
    let (mut passed, mut failed) = (0, LAST_STEP * 2);
    let mut steps = Vec::new();
    let mut next = FIRST_STEP;
    while next <= LAST_STEP && failed - passed > site.size(500, 1000) {
        let passes = passes(layout, Schedule { rate: next, time }, &mut steps, report).await?;
        *(if passes { &mut passed } else { &mut failed }) = next;
        next = if failed > LAST_STEP { passed * 2 } else { (passed + failed) / 2 };
    }
    report.raw("highest_rate", steps.into());
    Ok(passed)
}

/// Whether two of three runs pass, which means that their median passes. If the first two agree, there is no third. A
/// single run could be lucky or unlucky, and a rate that has failed is not tried again.
async fn passes(layout: &Layout, schedule: Schedule, steps: &mut Vec<Value>, report: &mut Report) -> Result<bool> {
    let mut verdicts = [0, 0];
    while verdicts[0].max(verdicts[1]) < 2 {
        let run = measure(layout, schedule, "3  search:", report).await?;
        let (p99, achieved) = (run.due_to_stock.at(P99), run.achieved);
        let passes = p99 < BOUND_MS && achieved >= ACHIEVED_AT_LEAST * f64::from(schedule.rate);
        steps
            .push(json!({ "rate": schedule.rate, "achieved": achieved, "due_to_stock_p99_ms": p99, "passes": passes }));
        verdicts[usize::from(passes)] += 1;
    }
    Ok(verdicts[1] == 2)
}
