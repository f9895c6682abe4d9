//! Whether relays obey a pause.

use std::net::SocketAddr;

use crate::{
    outbox::Outbox,
    receiver::{Receiver, Reply},
    relay::Relay,
    wait::until,
};

async fn start(outbox: &Outbox, receiver: SocketAddr) -> Relay {
    Relay::start(outbox, receiver, &[]).await
}

#[tokio::test]
async fn no_relay_leases_from_a_paused_outbox_even_if_it_starts_later() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = start(&outbox, receiver.address).await;
    outbox.wait_for_a_later_event().await;
    let pause = "INSERT INTO outbox_pauses (paused_by, reason) VALUES ('ann', 'to see')";
    sqlx::query(pause).execute(&outbox.pool).await.unwrap();
    let ids = outbox.insert_unrelated(10).await;
    let later = start(&outbox, receiver.address).await;
    let looked = "SELECT count(*) FROM outbox_routes, outbox_pauses WHERE seen_at > paused_at + interval '2 s'";
    let relays = async || sqlx::query_scalar::<_, i64>(looked).fetch_one(&outbox.pool).await.unwrap();
    until("both relays have looked for two seconds", async || relays().await == 2).await;
    let rows = outbox.rows().await;
    assert!(rows.len() == 10 && rows.iter().all(|row| row.lease_token.is_none() && row.visible), "{rows:?}");
    sqlx::query("DELETE FROM outbox_pauses").execute(&outbox.pool).await.unwrap();
    outbox.wait_until_empty().await;
    relay.stop().await;
    later.stop().await;
    assert!(receiver.read(|log| ids.iter().all(|id| log.times(*id) == 1)));
}
