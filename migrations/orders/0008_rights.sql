-- No role may do more than its statements do. Processes of the version before run on: theirs do no more either.
--
-- To take a right from a table takes it from each column too. So each column is granted after that.
--
-- In a new database, migration 0001 comes after outbox/0024, and has given this right again.
REVOKE UPDATE ON outbox FROM outbox_relay;
GRANT UPDATE (subscription_id, visible_at, created_at, lease_token, attempts, attempts_before_requeue, failures, attempted_at,
    charged_at, last_error) ON outbox TO outbox_relay;

-- Whose order it is, what it costs and what it contains never changes.
REVOKE INSERT, UPDATE ON orders FROM order_service;
GRANT INSERT (order_id, request_id, customer_id, currency_code, total_minor, derived_ids),
    UPDATE (status, rejection, cancel_request_id, cancelled_at, derived_ids) ON orders TO order_service;

-- Whether an event is there, and nothing of what it says.
REVOKE SELECT ON outbox, outbox_discarded, outbox_subscriptions FROM order_service;
GRANT SELECT (aggregate_id, subscription_id, sequence) ON outbox TO order_service;
GRANT SELECT (event_id, subscription_id) ON outbox_discarded TO order_service;
GRANT SELECT (subscription_id, name, type_like, created_at, ended_at) ON outbox_subscriptions TO order_service;
