-- No role may do more than its statements do. Processes of the version before run on: theirs do no more either.
--
-- To take a right from a table takes it from each column too. So each column is granted after that.
REVOKE UPDATE ON stock FROM inventory_service;
GRANT UPDATE (available) ON stock TO inventory_service;
-- The times that the database sets are not the role's to say.
REVOKE INSERT ON stock_ledger FROM inventory_service;
GRANT INSERT (reference, kind, sku, delta) ON stock_ledger TO inventory_service;
REVOKE INSERT, UPDATE ON reservations FROM inventory_service;
GRANT INSERT (order_id, event_id, status, rejection, cancelled_by, cancelled_at, derived_ids),
    UPDATE (status, cancelled_by, cancelled_at, derived_ids) ON reservations TO inventory_service;

-- Whether an event is there, and nothing of what it says.
REVOKE SELECT ON outbox, outbox_discarded, outbox_subscriptions FROM inventory_service;
GRANT SELECT (aggregate_id, subscription_id, sequence) ON outbox TO inventory_service;
GRANT SELECT (event_id, subscription_id) ON outbox_discarded TO inventory_service;
GRANT SELECT (subscription_id, name, type_like, created_at, ended_at) ON outbox_subscriptions TO inventory_service;
