-- Lets an operator reject an order whose event is discarded (outbox/0015), so that nobody waits for it for ever.
--
-- It runs with the owner's rights, since the relay's role knows no orders, and finds its tables in this schema and
-- nowhere else.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE FUNCTION outbox_refuse(aggregate_id uuid, event_type text, reason text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    found_status text;
BEGIN
    IF event_type <> 'orders.v1.OrderCreated' THEN
        RETURN format('only the creation of an order can be refused, and the event is %s', event_type);
    END IF;
    UPDATE orders SET status = 'REJECTED', rejection = outbox_refuse.reason
    WHERE order_id = outbox_refuse.aggregate_id AND status = 'PENDING';
    IF FOUND THEN
        -- For those who watch the order. It is sent by the commit.
        PERFORM pg_notify('order_status', '');
        RETURN NULL;
    END IF;
    SELECT status INTO found_status FROM orders WHERE order_id = outbox_refuse.aggregate_id;
    RETURN format('order %s %s', aggregate_id, coalesce('is ' || found_status, 'does not exist'));
END
$$;
COMMENT ON FUNCTION outbox_refuse IS 'Rejects the order whose event is being discarded. Returns NULL, or why it cannot.';
REVOKE ALL ON FUNCTION outbox_refuse FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_refuse TO outbox_relay;
