CREATE TABLE points (
    order_id     uuid   CONSTRAINT points_pkey PRIMARY KEY,
    customer_id  text   COLLATE "C",
    points       bigint NOT NULL,
    event_id     uuid,
    awarded_at   timestamptz,
    cancelled_by uuid,
    cancelled_at timestamptz,
    CONSTRAINT points_not_negative CHECK (points >= 0),
    CONSTRAINT points_awarded_at CHECK ((event_id IS NULL) = (awarded_at IS NULL)),
    CONSTRAINT points_awarded_to CHECK ((event_id IS NULL) = (customer_id IS NULL)),
    CONSTRAINT points_awarded_by_event CHECK (event_id IS NOT NULL OR points = 0),
    CONSTRAINT points_cancelled_by_at CHECK ((cancelled_by IS NULL) = (cancelled_at IS NULL)),
    CONSTRAINT points_of_some_event CHECK (event_id IS NOT NULL OR cancelled_by IS NOT NULL)
);
COMMENT ON TABLE points IS 'What each order earned. Rows without cancelled_by count.';
COMMENT ON COLUMN points.event_id IS 'The event that awarded; NULL: none had come when the order was cancelled.';
COMMENT ON COLUMN points.cancelled_by IS 'The event that cancelled the order.';
CREATE INDEX points_of_customer ON points (customer_id) WHERE cancelled_by IS NULL;

-- A process checks at its start that the schema is one it knows.
GRANT SELECT ON _outbox_migrations, _loyalty_migrations TO loyalty_service;
GRANT SELECT, INSERT ON points TO loyalty_service;
-- An award never changes.
GRANT UPDATE (cancelled_by, cancelled_at) ON points TO loyalty_service;
GRANT SELECT, INSERT, DELETE ON processed_messages TO loyalty_service;
GRANT SELECT, INSERT, UPDATE ON inbox_pruned TO loyalty_service;
