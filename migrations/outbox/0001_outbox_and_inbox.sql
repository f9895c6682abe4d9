-- The outbox and the inbox, the same in every database that sends or receives events.

-- One column says when a row may be taken: enqueuing sets now, a lease its expiry, back-off its end, death infinity.
-- So what is leased, backing off or dead does not stand in the way of the scan for work, there is no status that could
-- disagree with the times, and an expired lease needs no sweeper: it is a visible row again. (What waits for such a row
-- of its own aggregate is visible, and scanned in vain.)
CREATE TABLE outbox (
    aggregate_id uuid        NOT NULL,
    event_id     uuid        NOT NULL,
    visible_at   timestamptz NOT NULL DEFAULT now(),
    created_at   timestamptz NOT NULL DEFAULT now(),
    lease_token  uuid,
    sequence     integer     NOT NULL,
    attempts     integer     NOT NULL DEFAULT 0,
    event_type   text        NOT NULL,
    payload      bytea       NOT NULL,
    traceparent  text,
    tracestate   text,
    last_error   text,
    CONSTRAINT outbox_pkey PRIMARY KEY (aggregate_id, sequence),
    CONSTRAINT outbox_sequence_from_one CHECK (sequence >= 1),
    CONSTRAINT outbox_dead_is_not_leased CHECK (visible_at < 'infinity' OR lease_token IS NULL),
    CONSTRAINT outbox_dead_has_reason CHECK (visible_at < 'infinity' OR last_error IS NOT NULL)
) WITH (
    -- Every row is inserted, updated and deleted within moments, so VACUUM goes by rows, not by share of a table that
    -- is nearly always empty, and does not pause.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);
COMMENT ON TABLE outbox IS 'Events committed with the change they tell of, until they are delivered. A row that is gone was handled.';
COMMENT ON COLUMN outbox.aggregate_id IS 'What the event is about (CloudEvents subject). Its events are delivered one after the other.';
COMMENT ON COLUMN outbox.event_id IS 'UUID v7 (CloudEvents id), the same in every delivery: receivers deduplicate by it.';
COMMENT ON COLUMN outbox.visible_at IS 'When a relay may take the row: at once, after a lease expires, after back-off; infinity: dead, until an operator requeues it.';
COMMENT ON COLUMN outbox.created_at IS 'Start of the transaction that enqueued the event (CloudEvents time).';
COMMENT ON COLUMN outbox.lease_token IS 'Of the lease that holds, or last held, the row. Settling demands it; NULL: not leased.';
COMMENT ON COLUMN outbox.sequence IS 'Position among the events of the aggregate, from 1 without gaps. A row waits until its predecessors are gone.';
COMMENT ON COLUMN outbox.attempts IS 'Deliveries that failed for reasons of this event. Outages of the receiver do not count.';
COMMENT ON COLUMN outbox.event_type IS 'Full protobuf name of the payload (CloudEvents type).';
COMMENT ON COLUMN outbox.payload IS 'The encoded protobuf message (CloudEvents data).';
COMMENT ON COLUMN outbox.traceparent IS 'W3C trace context of the call that enqueued the event.';
COMMENT ON COLUMN outbox.tracestate IS 'W3C vendor trace state of the call that enqueued the event.';
COMMENT ON COLUMN outbox.last_error IS 'Why the last delivery failed; of a dead row, why it died.';

CREATE INDEX outbox_visible_at ON outbox (visible_at);
-- Dead rows are looked up by id. There is no index for that over all rows: it would cost every insert, and ids are made
-- by the library as UUID v7, never by callers.
CREATE INDEX outbox_dead ON outbox (event_id) WHERE visible_at = 'infinity';

CREATE TABLE processed_messages (
    message_id   uuid        CONSTRAINT processed_messages_pkey PRIMARY KEY,
    processed_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE processed_messages IS 'Inbox: ids of the events whose effect is committed here, written in the transaction of that effect.';
COMMENT ON COLUMN processed_messages.message_id IS 'The event''s id; its unique key decides races between deliveries.';
COMMENT ON COLUMN processed_messages.processed_at IS 'Start of the transaction that applied the event.';
