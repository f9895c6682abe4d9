-- A plain name for the attempts that no longer count. Relays name this column in their statements. So stop every older
-- relay before this migration, and do not go back to one.
--
-- An older relay that still runs, or is started again later, starts and leases events. But it cannot settle an event
-- that failed: that statement fails with 42703. Of the lease it has settled only the handled events by then, and
-- settles nothing later. Its worker repeats the settlement until the lease expires, and in a probe the whole route
-- stands still meanwhile. The failed event spends no attempt, so this happens again at its next delivery. No event is
-- lost or applied twice.
--
-- The rename waits for every open transaction on the outbox, and holds up those that begin after it. It takes a moment
-- once it has the table, so only a long transaction, such as a dump, makes it slow.
ALTER TABLE outbox RENAME COLUMN pardoned TO attempts_before_requeue;
COMMENT ON COLUMN outbox.attempts_before_requeue IS 'Attempts at the time of the last requeue. They stay on record, and do not count towards death.';
