//! Part 4: whether a drain is slower if every order needs the same SKU.
//!
//! There are two backlogs of orders with one item: all with one SKU, or spread over 1,000 SKUs. Their drains alternate,
//! as in part 2.

use anyhow::Result;
use serde_json::json;

use super::{
    backlog::Backlog,
    quantiles::median,
    report::{Report, Table, number},
    requests::Shape,
    site::Site,
};

/// Measures and prints.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let events = site.size(100_000, 10_000);
    println!("bench: 4  placing 2 × {} orders", number(events as f64));
    let mut hot = Backlog::place(site, "hot", events, Shape { skus: 1, items: 1 }).await?;
    let mut spread = Backlog::place(site, "spread", events, Shape { skus: 1000, items: 1 }).await?;
    let (mut hot_rates, mut spread_rates) = (Vec::new(), Vec::new());
    for round in 1..=site.rounds() {
        for (name, backlog, rates) in
            [("one hot SKU", &mut hot, &mut hot_rates), ("1,000 SKUs", &mut spread, &mut spread_rates)]
        {
            let drained = backlog.drain(events, &[], None).await?;
            println!("bench: 4  round {round}  {name:<11} {:>8} events/s", number(drained.rate));
            rates.push(drained.rate);
        }
    }
    let mut table = Table::new("4. Hot SKU (drains as in part 2)", &["", "events/s"]);
    for (name, rates) in [("one hot SKU", &hot_rates), ("1,000 SKUs", &spread_rates)] {
        table.row([name.into(), number(median(rates))]);
    }
    table.print();
    report.figure("hot_over_1000_skus", median(&hot_rates) / median(&spread_rates));
    report.raw("hot_sku", json!({ "hot": hot_rates, "spread": spread_rates }));
    println!("bench: 4  delivering the answers");
    hot.finish(report).await?;
    spread.finish(report).await
}
