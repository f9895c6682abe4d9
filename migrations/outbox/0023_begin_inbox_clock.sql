-- The inbox's clock begins with the schema, not with the first process that moves it. If the server's clock jumped ahead
-- before that, the inbox would begin with the wrong time, and its first events would be stale.
INSERT INTO inbox_pruned (until, clock) VALUES ('-infinity', now()) ON CONFLICT DO NOTHING;
