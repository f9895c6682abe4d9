-- What an operator can do about an event beside discarding it: refuse what it tells of, and bring it back. Relays of the
-- version before run on: they discard without either.
--
-- To refuse, a discard calls `outbox_refuse(aggregate_id uuid, event_type text, reason text) RETURNS text` in its
-- transaction. The service that owns the database may define it, since only that knows the aggregate. It returns NULL if
-- it has refused, or else why it cannot. Give EXECUTE on it to outbox_relay.
ALTER TABLE outbox_discarded ADD COLUMN refused boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN outbox_discarded.refused IS 'Whether the discard has refused what the event tells of. It cannot be undone then.';

-- As for outbox_enqueue: it runs with the owner's rights, and finds its tables in this schema and nowhere else.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE FUNCTION outbox_restore(event uuid, subscription smallint, restored_by text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    restored bigint;
BEGIN
    WITH brought_back AS (
        DELETE FROM outbox_discarded AS discarded
        WHERE discarded.event_id = event AND NOT discarded.refused
          AND (subscription IS NULL OR discarded.subscription_id = subscription)
        RETURNING discarded.*
    )
    INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload, created_at, attempts,
        traceparent, tracestate, visible_at, last_error)
    SELECT subscription_id, aggregate_id, sequence, event_id, event_type, payload, created_at, attempts, traceparent,
        tracestate, 'infinity', format('%s (discarded by %s at %s: %s; restored by %s at %s)', last_error, discarded_by,
            date_trunc('second', discarded_at), reason, restored_by, date_trunc('second', now()))
    FROM brought_back;
    GET DIAGNOSTICS restored = ROW_COUNT;
    RETURN restored;
END
$$;
COMMENT ON FUNCTION outbox_restore IS 'Moves a discarded event back into the outbox, dead as it was, in one subscription or in each. Returns the number of rows.';
REVOKE ALL ON FUNCTION outbox_restore FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_restore TO outbox_relay;
