-- Resuming slowly: how many events of a subscription its relays deliver in a second at most, so that a backlog does not run a
-- receiver over. A table of its own, since leases ask for pauses, and need not know of this. Relays of the version before
-- deliver as fast as they can.
CREATE TABLE outbox_paces (
    subscription_id   smallint    CONSTRAINT outbox_paces_pkey PRIMARY KEY,
    events_per_second integer     NOT NULL,
    set_at            timestamptz NOT NULL DEFAULT now(),
    set_by            text        NOT NULL,
    reason            text        NOT NULL,
    CONSTRAINT outbox_paces_positive CHECK (events_per_second > 0)
);
COMMENT ON TABLE outbox_paces IS 'While it has a row, the relays of that subscription together deliver no more; with 0, those of each subscription.';
GRANT SELECT, INSERT, DELETE ON outbox_paces TO outbox_relay;

ALTER TABLE outbox_routes ADD COLUMN paces_read_at timestamptz;
COMMENT ON COLUMN outbox_routes.paces_read_at IS 'When the relay has read the paces last. NULL: not yet, or it is of a version that keeps none.';
GRANT UPDATE (events_per_second, set_at, set_by, reason) ON outbox_paces TO outbox_relay;
