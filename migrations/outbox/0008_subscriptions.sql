-- Subscriptions: each event is enqueued once for every subscription that matches its type, so each subscriber has a
-- queue of its own. Services enqueue through one function, which asks the table of subscriptions.
--
-- Services and relays of the version before run on. The rows that services insert directly pass through the function as
-- well, by a trigger. Older relays lease whatever they find, so there may be one subscription until they have ended:
-- migration 0013, a contracting one, then takes away what was kept for them.
CREATE TABLE outbox_subscriptions (
    subscription_id smallint    GENERATED ALWAYS AS IDENTITY CONSTRAINT outbox_subscriptions_pkey PRIMARY KEY,
    name            text        NOT NULL,
    pattern         text        NOT NULL,
    type_like       text        NOT NULL GENERATED ALWAYS AS (replace(replace(pattern, '_', '\_'), '*', '%')) STORED,
    created_at      timestamptz NOT NULL DEFAULT now(),
    created_by      text        NOT NULL,
    max_age_seconds integer,
    ended_at        timestamptz,
    ended_by        text,
    reason          text,
    CONSTRAINT outbox_subscriptions_name_plain CHECK (name ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    CONSTRAINT outbox_subscriptions_pattern_plain CHECK (pattern ~ '^([A-Za-z0-9_.]+|[A-Za-z0-9_.]*\*)$'),
    CONSTRAINT outbox_subscriptions_end_has_reason CHECK (
        (ended_at IS NULL AND ended_by IS NULL AND reason IS NULL)
        OR (ended_at IS NOT NULL AND ended_by IS NOT NULL AND reason IS NOT NULL))
);
COMMENT ON TABLE outbox_subscriptions IS 'Who gets which events. A subscription that has ended stays, and its events were discarded.';
COMMENT ON COLUMN outbox_subscriptions.subscription_id IS 'From 1. The events that match no subscription have 0.';
COMMENT ON COLUMN outbox_subscriptions.pattern IS 'A full event type, or a prefix of event types that ends in *.';
COMMENT ON COLUMN outbox_subscriptions.type_like IS 'The pattern, in the syntax of LIKE.';
COMMENT ON COLUMN outbox_subscriptions.max_age_seconds IS 'How old its events may be when they are delivered, by what its receiver told the relays. NULL: it has not told yet.';
COMMENT ON COLUMN outbox_subscriptions.reason IS 'Why it was ended.';
CREATE UNIQUE INDEX outbox_subscriptions_name ON outbox_subscriptions (name) WHERE ended_at IS NULL;

-- The rows there are belong to no subscription yet, and go to the first one that is made for their type. Rows that are
-- inserted directly get -1, by which the trigger knows them.
ALTER TABLE outbox ADD COLUMN subscription_id smallint NOT NULL DEFAULT 0;
ALTER TABLE outbox ALTER COLUMN subscription_id SET DEFAULT -1;
COMMENT ON COLUMN outbox.subscription_id IS 'Which subscription the row is for; 0: none matched when the event was enqueued.';
COMMENT ON COLUMN outbox.sequence IS 'Position among the events of the aggregate, from 1 without gaps. A row waits until its predecessors in its subscription are gone.';
COMMENT ON TABLE outbox IS 'Events committed with the change they tell of, one row for each subscription, until they are delivered. A row that is gone was handled.';

ALTER TABLE outbox_discarded ADD COLUMN subscription_id smallint NOT NULL DEFAULT 0;
ALTER TABLE outbox_discarded DROP CONSTRAINT outbox_discarded_pkey;
ALTER TABLE outbox_discarded ADD CONSTRAINT outbox_discarded_pkey PRIMARY KEY (event_id, subscription_id);
COMMENT ON TABLE outbox_discarded IS 'Events that were given up, whole, with who did it, when and why: dead ones, and those of subscriptions that ended.';

-- A pause of one subscription, or with 0 of all. Older relays, and their operator's commands, find the pause of all
-- where they look for it.
ALTER TABLE outbox_pause RENAME TO outbox_pauses;
ALTER TABLE outbox_pauses DROP CONSTRAINT outbox_pause_pkey;
ALTER TABLE outbox_pauses DROP CONSTRAINT outbox_pause_one_row;
ALTER TABLE outbox_pauses DROP COLUMN singleton;
ALTER TABLE outbox_pauses ADD COLUMN subscription_id smallint NOT NULL DEFAULT 0;
ALTER TABLE outbox_pauses ADD CONSTRAINT outbox_pauses_pkey PRIMARY KEY (subscription_id);
COMMENT ON TABLE outbox_pauses IS 'While it has a row, no relay leases events of that subscription; with 0, of any.';
CREATE VIEW outbox_pause AS SELECT paused_at, paused_by, reason FROM outbox_pauses WHERE subscription_id = 0;
GRANT SELECT, INSERT, DELETE ON outbox_pause TO outbox_relay;

GRANT SELECT, INSERT, UPDATE ON outbox_subscriptions TO outbox_relay;

-- Both functions run with the owner's rights, so they find their tables in this schema and nowhere else: a caller's
-- temporary table of the same name comes last.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE FUNCTION outbox_enqueue(
    aggregate_ids uuid[], sequences integer[], event_ids uuid[], event_types text[], payloads bytea[],
    traceparents text[], tracestates text[]
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    enqueued bigint;
BEGIN
    -- A column is named by its table throughout: the parameters are called like columns in the plural, and no more.
    INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
    SELECT coalesce(subscription.subscription_id, 0), event.*
    FROM unnest(aggregate_ids, sequences, event_ids, event_types, payloads, traceparents, tracestates)
        AS event (aggregate_id, sequence, event_id, event_type, payload, traceparent, tracestate)
    LEFT JOIN outbox_subscriptions AS subscription
        ON event.event_type LIKE subscription.type_like AND subscription.ended_at IS NULL;
    GET DIAGNOSTICS enqueued = ROW_COUNT;
    RETURN enqueued;
END
$$;
COMMENT ON FUNCTION outbox_enqueue IS 'Enqueues events, in the transaction of the change they tell of: a row for each subscription that matches, or one that waits for the first that does. Returns the number of rows.';
REVOKE ALL ON FUNCTION outbox_enqueue FROM PUBLIC;

CREATE FUNCTION outbox_enqueue_directly_inserted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM outbox_enqueue(ARRAY[NEW.aggregate_id], ARRAY[NEW.sequence], ARRAY[NEW.event_id], ARRAY[NEW.event_type],
        ARRAY[NEW.payload], ARRAY[NEW.traceparent], ARRAY[NEW.tracestate]);
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION outbox_enqueue_directly_inserted FROM PUBLIC;
CREATE TRIGGER outbox_enqueue_directly_inserted BEFORE INSERT ON outbox
    FOR EACH ROW WHEN (NEW.subscription_id = -1) EXECUTE FUNCTION outbox_enqueue_directly_inserted();
