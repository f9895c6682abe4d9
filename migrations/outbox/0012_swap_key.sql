-- The key of migration 0009 in place of the old one. It takes a moment once it has the table.
ALTER TABLE outbox
    DROP CONSTRAINT outbox_pkey,
    ADD CONSTRAINT outbox_pkey PRIMARY KEY USING INDEX outbox_key_by_subscription;
