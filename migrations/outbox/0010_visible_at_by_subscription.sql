-- no-transaction
CREATE INDEX CONCURRENTLY outbox_by_subscription ON outbox (subscription_id, visible_at);
