-- no-transaction
CREATE INDEX CONCURRENTLY outbox_later ON outbox (subscription_id, visible_at) WHERE sequence > 1;
