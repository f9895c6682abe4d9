-- no-transaction
-- For the journey of a subject, whose discarded events would otherwise be looked for in the whole table. A subscription that
-- ended may have left millions there.
CREATE INDEX CONCURRENTLY outbox_discarded_aggregate ON outbox_discarded (aggregate_id);
