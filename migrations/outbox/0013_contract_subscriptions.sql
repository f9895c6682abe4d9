-- Takes away what migration 0008 kept for services and relays of the version before, so none may run any more.
--
-- An older relay that does leases nothing from now on: its statement fails, since it names the view. An older service
-- that does enqueues nothing: its statement names no subscription, and its changes are rolled back. Neither loses an
-- event.
DROP VIEW outbox_pause;
DROP TRIGGER outbox_enqueue_directly_inserted ON outbox;
DROP FUNCTION outbox_enqueue_directly_inserted;
ALTER TABLE outbox ALTER COLUMN subscription_id DROP DEFAULT;
DROP INDEX outbox_visible_at, outbox_successors;
