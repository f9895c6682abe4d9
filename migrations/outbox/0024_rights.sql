-- The relay's role may change what its statements change, and nothing else. It leases, settles and requeues events. What an
-- event says, whose it is and where it stands in line is the service's. (Whoever has the relay's password can still put an
-- event of his own among the discarded ones, and bring that back.)
-- Relays and commands of the version before run on: they change no other column.
--
-- To take a right from a table takes it from each column too. So each column is granted after that.
REVOKE UPDATE ON outbox FROM outbox_relay;
GRANT UPDATE (subscription_id, visible_at, created_at, lease_token, attempts, attempts_before_requeue, failures, attempted_at,
    charged_at, last_error) ON outbox TO outbox_relay;

-- The ids and times that the database sets are not the role's to say. The right to insert subscriptions stays whole: the lock
-- under which one is made needs a right on the whole table.
REVOKE INSERT, UPDATE ON outbox_pauses FROM outbox_relay;
GRANT INSERT (subscription_id, paused_by, reason) ON outbox_pauses TO outbox_relay;
REVOKE INSERT ON outbox_paces FROM outbox_relay;
GRANT INSERT (subscription_id, events_per_second, set_by, reason) ON outbox_paces TO outbox_relay;
REVOKE INSERT ON outbox_discarded FROM outbox_relay;
GRANT INSERT (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload, traceparent,
    tracestate, last_error, discarded_by, reason, refused) ON outbox_discarded TO outbox_relay;
REVOKE INSERT, UPDATE ON outbox_routes FROM outbox_relay;
GRANT INSERT (relay_id, route, receiver, state, reason, delivered, paces_read_at, holds_lock, hidden_seconds_max),
    UPDATE (state, reason, delivered, paces_read_at, holds_lock, since, seen_at) ON outbox_routes TO outbox_relay;
