-- How fast a subscription flows, for operators: the difference of two readings. Relays of the version before leave it as it
-- is.
ALTER TABLE outbox_routes ADD COLUMN delivered bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN outbox_routes.delivered IS 'Events that the relay has delivered on this route since it started.';
