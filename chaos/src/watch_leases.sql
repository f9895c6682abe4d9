-- chaos: watch leases
-- Checks the lease protocol in the database, independent of what relays log. The application name of a session says
-- which relay it belongs to, and to which of its starts.
CREATE TABLE chaos_leases (
    lease_token uuid CONSTRAINT chaos_leases_pkey PRIMARY KEY,
    holder      text NOT NULL
);
CREATE TABLE chaos_breaches (
    at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    breach   text        NOT NULL,
    event_id uuid        NOT NULL,
    session  text        NOT NULL
);

CREATE FUNCTION chaos_watch_lease() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
DECLARE
    session text := current_setting('application_name');
    held_by text;
    behind boolean;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.lease_token IS NOT NULL AND NEW.lease_token IS DISTINCT FROM OLD.lease_token THEN
        INSERT INTO chaos_leases VALUES (NEW.lease_token, session) ON CONFLICT DO NOTHING;
        -- A run takes parked events behind one that this lease holds.
        behind := EXISTS (
            SELECT FROM outbox
            WHERE aggregate_id = NEW.aggregate_id AND subscription_id = NEW.subscription_id AND sequence < NEW.sequence
              AND lease_token = NEW.lease_token);
        IF OLD.visible_at > now() AND NOT (behind AND OLD.lease_token IS NULL) THEN
            INSERT INTO chaos_breaches (breach, event_id, session)
            VALUES ('leased before it was visible', NEW.event_id, session);
        END IF;
        IF EXISTS (
            SELECT FROM outbox
            WHERE aggregate_id = NEW.aggregate_id AND sequence < NEW.sequence
              AND (subscription_id = NEW.subscription_id OR subscription_id = 0 AND event_type LIKE (
                  SELECT type_like FROM outbox_subscriptions WHERE subscription_id = NEW.subscription_id))
              AND lease_token IS DISTINCT FROM NEW.lease_token)
        THEN
            INSERT INTO chaos_breaches (breach, event_id, session)
            VALUES ('leased before its predecessor was settled', NEW.event_id, session);
        END IF;
    ELSIF OLD.lease_token IS NOT NULL AND (TG_OP = 'DELETE' OR NEW.lease_token IS NULL) THEN
        SELECT holder INTO held_by FROM chaos_leases WHERE lease_token = OLD.lease_token;
        IF held_by IS DISTINCT FROM session THEN
            INSERT INTO chaos_breaches (breach, event_id, session)
            VALUES ('settled by another relay than the last that leased it', OLD.event_id, session);
        END IF;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO chaos_breaches (breach, event_id, session) VALUES ('deleted without a lease', OLD.event_id, session);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER chaos_watch_lease AFTER UPDATE OR DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION chaos_watch_lease();
