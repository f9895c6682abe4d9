-- What operators do to an outbox: who, when and why, each deed in the transaction of its effect, so that it can be undone.
-- Relays and commands of the version before run on, and leave no deeds.
CREATE TABLE outbox_deeds (
    deed_id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT outbox_deeds_pkey PRIMARY KEY,
    done_at         timestamptz NOT NULL DEFAULT now(),
    done_by         text        NOT NULL,
    kind            text        NOT NULL,
    subscription_id smallint,
    reason          text        NOT NULL,
    about           text        NOT NULL,
    can_undo        boolean     NOT NULL,
    undoes          bigint      CONSTRAINT outbox_deeds_undoes REFERENCES outbox_deeds ON DELETE CASCADE,
    CONSTRAINT outbox_deeds_kind_known CHECK (
        kind IN ('requeue', 'discard', 'restore', 'pause', 'resume', 'subscribe', 'unsubscribe', 'undo')),
    CONSTRAINT outbox_deeds_undo_has_deed CHECK ((kind = 'undo') = (undoes IS NOT NULL))
);
COMMENT ON TABLE outbox_deeds IS 'What operators have done. Nobody but the owner can change or delete a deed.';
COMMENT ON COLUMN outbox_deeds.subscription_id IS 'The subscription that it was restricted to. NULL: all, or each.';
COMMENT ON COLUMN outbox_deeds.reason IS 'The operator''s reason; may be empty.';
COMMENT ON COLUMN outbox_deeds.about IS 'What it was about, for people: which events it was to change, or the pause that it ended.';
COMMENT ON COLUMN outbox_deeds.can_undo IS 'Whether a deed of this kind can be undone. What it changed may have changed since.';
COMMENT ON COLUMN outbox_deeds.undoes IS 'The deed that this one undid.';
CREATE INDEX outbox_deeds_undone ON outbox_deeds (undoes) WHERE undoes IS NOT NULL;

CREATE TABLE outbox_deed_events (
    change_id       bigint   GENERATED ALWAYS AS IDENTITY CONSTRAINT outbox_deed_events_pkey PRIMARY KEY,
    deed_id         bigint   NOT NULL CONSTRAINT outbox_deed_events_deed REFERENCES outbox_deeds ON DELETE CASCADE,
    event_id        uuid     NOT NULL,
    subscription_id smallint NOT NULL,
    aggregate_id    uuid     NOT NULL,
    sequence        integer  NOT NULL
);
COMMENT ON TABLE outbox_deed_events IS 'The events that a deed has changed.';
COMMENT ON COLUMN outbox_deed_events.change_id IS 'Of two changes of an event, the later one has the larger: it is drawn while the event is locked. A deed may take hours.';
CREATE INDEX outbox_deed_events_deed ON outbox_deed_events (deed_id, event_id, subscription_id, change_id);
-- For the deeds of an event, and whether a later one has changed it.
CREATE INDEX outbox_deed_events_event ON outbox_deed_events (event_id, subscription_id, change_id);

-- Not the ids, and not the time.
GRANT SELECT ON outbox_deeds, outbox_deed_events TO outbox_relay;
GRANT INSERT (done_by, kind, subscription_id, reason, about, can_undo, undoes) ON outbox_deeds TO outbox_relay;
GRANT INSERT (deed_id, event_id, subscription_id, aggregate_id, sequence) ON outbox_deed_events TO outbox_relay;

-- An event that was discarded, sent again and died again is discarded once more, over its earlier row. Whether it was
-- refused stays as it is: a refusal cannot be taken back.
GRANT UPDATE (created_at, attempts, last_error, discarded_at, discarded_by, reason) ON outbox_discarded TO outbox_relay;
