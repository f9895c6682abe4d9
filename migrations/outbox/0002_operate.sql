-- What it takes to operate an outbox and an inbox for years.

ALTER TABLE outbox ADD COLUMN pardoned integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN outbox.pardoned IS 'Attempts at the time of the last requeue: they stay on record, and no longer count towards death.';
-- Successors are found here when they have to be kept out of the scan for work; few rows are any.
CREATE INDEX outbox_successors ON outbox (visible_at) WHERE sequence > 1;

CREATE TABLE outbox_pause (
    singleton boolean     NOT NULL DEFAULT true CONSTRAINT outbox_pause_pkey PRIMARY KEY,
    paused_at timestamptz NOT NULL DEFAULT now(),
    paused_by text        NOT NULL,
    reason    text        NOT NULL,
    CONSTRAINT outbox_pause_one_row CHECK (singleton)
);
COMMENT ON TABLE outbox_pause IS 'While it has a row, no relay leases anything from the outbox.';

CREATE TABLE outbox_discarded (
    event_id     uuid        CONSTRAINT outbox_discarded_pkey PRIMARY KEY,
    aggregate_id uuid        NOT NULL,
    sequence     integer     NOT NULL,
    created_at   timestamptz NOT NULL,
    attempts     integer     NOT NULL,
    event_type   text        NOT NULL,
    payload      bytea       NOT NULL,
    traceparent  text,
    tracestate   text,
    last_error   text        NOT NULL,
    discarded_at timestamptz NOT NULL DEFAULT now(),
    discarded_by text        NOT NULL,
    reason       text        NOT NULL
);
COMMENT ON TABLE outbox_discarded IS 'Dead events an operator has given up, whole, with who did it, when and why.';

CREATE TABLE outbox_routes (
    relay_id uuid        NOT NULL,
    route    text        NOT NULL,
    receiver text        NOT NULL,
    state    text        NOT NULL,
    since    timestamptz NOT NULL DEFAULT now(),
    seen_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT outbox_routes_pkey PRIMARY KEY (relay_id, route)
);
COMMENT ON TABLE outbox_routes IS 'How the relays that are running find their receivers: written by them every second, for operators to read.';
COMMENT ON COLUMN outbox_routes.relay_id IS 'Of one relay process.';
COMMENT ON COLUMN outbox_routes.route IS 'Pattern of the event types that go this way.';

-- The relay, which is also how an operator comes in.
GRANT SELECT ON _outbox_migrations TO outbox_relay;
GRANT SELECT, UPDATE, DELETE ON outbox TO outbox_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_pause, outbox_routes TO outbox_relay;
GRANT SELECT, INSERT ON outbox_discarded TO outbox_relay;

-- Pruning the inbox goes by time.
CREATE INDEX processed_messages_processed_at ON processed_messages (processed_at);
CREATE TABLE inbox_pruned (
    singleton boolean     NOT NULL DEFAULT true CONSTRAINT inbox_pruned_pkey PRIMARY KEY,
    until     timestamptz NOT NULL,
    CONSTRAINT inbox_pruned_one_row CHECK (singleton)
);
COMMENT ON TABLE inbox_pruned IS 'How far the inbox has forgotten: what stays refused as stale when the retention is made longer.';
