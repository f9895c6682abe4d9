-- Sending events again that a receiver has lost, because its database was restored to an earlier state. Services and
-- relays of the version before run on beside it.
COMMENT ON COLUMN outbox.event_id IS 'UUID (CloudEvents id), the same in every delivery: receivers deduplicate by it. The library derives it from the source, the aggregate and the sequence, so that an event can be sent again under the id that it had.';

CREATE TABLE outbox_resent (
    event_id        uuid        NOT NULL,
    subscription_id smallint    NOT NULL,
    aggregate_id    uuid        NOT NULL,
    sequence        integer     NOT NULL,
    resent_at       timestamptz NOT NULL DEFAULT now(),
    resent_by       text        NOT NULL,
    reason          text        NOT NULL,
    CONSTRAINT outbox_resent_pkey PRIMARY KEY (event_id, subscription_id, resent_at)
);
COMMENT ON TABLE outbox_resent IS 'Events that an operator has enqueued again, each time, with who did it, when and why.';

-- As for outbox_enqueue: it runs with the owner's rights, and finds its tables in this schema and nowhere else.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE FUNCTION outbox_resend(
    subscription smallint, aggregate_ids uuid[], sequences integer[], event_ids uuid[], event_types text[],
    payloads bytea[], created_ats timestamptz[], resent_by text, reason text
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    resent bigint;
BEGIN
    -- The event keeps the time that it had: by its age, relays and receivers refuse what may have been forgotten. A row
    -- that waits, is leased or is dead stays as it is. So does one that waits for a subscription.
    WITH again AS (
        INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, created_at)
        SELECT named.subscription_id, event.*
        FROM unnest(aggregate_ids, sequences, event_ids, event_types, payloads, created_ats)
            AS event (aggregate_id, sequence, event_id, event_type, payload, created_at)
        JOIN outbox_subscriptions AS named
            ON named.subscription_id = outbox_resend.subscription AND named.ended_at IS NULL
            AND event.event_type LIKE named.type_like
        -- As a subquery it can only be looked up by the key. As a join, a plan that was made over a small outbox would read
        -- all of a large one.
        WHERE (
            SELECT true FROM outbox AS unrouted
            WHERE unrouted.aggregate_id = event.aggregate_id AND unrouted.subscription_id = 0
              AND unrouted.sequence = event.sequence) IS NULL
        ON CONFLICT DO NOTHING
        RETURNING outbox.event_id, outbox.subscription_id, outbox.aggregate_id, outbox.sequence
    )
    INSERT INTO outbox_resent (event_id, subscription_id, aggregate_id, sequence, resent_by, reason)
    SELECT again.*, outbox_resend.resent_by, outbox_resend.reason FROM again;
    GET DIAGNOSTICS resent = ROW_COUNT;
    RETURN resent;
END
$$;
COMMENT ON FUNCTION outbox_resend IS 'Enqueues events again for one subscription, at the time that they had, and records who did it and why. Leaves out those that are in the outbox. Returns the number of rows.';
REVOKE ALL ON FUNCTION outbox_resend FROM PUBLIC;
