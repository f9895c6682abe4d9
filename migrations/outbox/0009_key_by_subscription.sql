-- no-transaction
CREATE UNIQUE INDEX CONCURRENTLY outbox_key_by_subscription ON outbox (aggregate_id, subscription_id, sequence);
