-- no-transaction
CREATE INDEX CONCURRENTLY outbox_first ON outbox (subscription_id, visible_at) WHERE sequence = 1;
