-- Roles, made once per server by a superuser. Owners change the schema (`… migrate`); services and relay only use it.
-- The passwords are the names, for one machine: anywhere else, ALTER ROLE … PASSWORD right after.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'orders_owner', 'order_service', 'inventory_owner', 'inventory_service', 'loyalty_owner', 'loyalty_service',
        'outbox_relay'
    ] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN PASSWORD %L', name, name);
            -- No role can take all of a server's sessions, which are 100 by default, from the others. A process has at most
            -- 22: DATABASE_CONNECTIONS (16), one each to listen, to notify or show that it lives, to probe, and to look for
            -- a standby, and a relay two for operators. So this is enough for two processes, and a third that replaces one
            -- of them. With more processes, or larger pools, raise it, and the server's max_connections: ALTER ROLE …
            -- CONNECTION LIMIT …. So it is set only when a role is made. Owners have none: no migration is to be kept out.
            IF name NOT LIKE '%\_owner' THEN
                EXECUTE format('ALTER ROLE %I CONNECTION LIMIT 66', name);
            END IF;
        END IF;
    END LOOP;
    -- A session that stops inside a transaction would hold its locks, and the horizon of VACUUM, for ever. Processes
    -- bound their own work at 5 s; these ends are for the day a process or its network cannot. A wait for a lock is part of a
    -- statement, so it has no limit of its own. An idle session has none either: one that listens says nothing for days.
    FOREACH name IN ARRAY ARRAY['order_service', 'inventory_service', 'loyalty_service', 'outbox_relay'] LOOP
        EXECUTE format('ALTER ROLE %I SET idle_in_transaction_session_timeout = ''10s''', name);
        EXECUTE format('ALTER ROLE %I SET statement_timeout = ''10s''', name);
        -- The sessions of a machine that is gone without a word would count towards the limit above for two hours, by the
        -- default of most systems. So the server asks after a minute of silence, and gives up after half a minute more.
        EXECUTE format('ALTER ROLE %I SET tcp_keepalives_idle = ''60s''', name);
        EXECUTE format('ALTER ROLE %I SET tcp_keepalives_interval = ''10s''', name);
        EXECUTE format('ALTER ROLE %I SET tcp_keepalives_count = 3', name);
        -- Sessions keep the plans of their statements. One made while a table is nearly empty, as an outbox is on most
        -- days, would scan it from end to end on the day it holds a million rows: every statement finds its rows by an
        -- index, and is to do so from the start. (Where there is none, as for counting, a scan is still made; JIT, which
        -- goes by the price that is put on it, would only add to that.)
        EXECUTE format('ALTER ROLE %I SET enable_seqscan = off', name);
        EXECUTE format('ALTER ROLE %I SET jit = off', name);
    END LOOP;
    -- No statement of the services has another plan for other parameters, and planning a batch anew each time takes up to as
    -- long as executing a small one. Operators come in as the relay, and theirs have: all dead events, or these. So the
    -- relay says the same for its own sessions.
    ALTER ROLE order_service SET plan_cache_mode = force_generic_plan;
    ALTER ROLE inventory_service SET plan_cache_mode = force_generic_plan;
    ALTER ROLE loyalty_service SET plan_cache_mode = force_generic_plan;
    -- Losing a lease or a delete in a crash only delivers an event again, and the receiver drops what it has had.
    -- Orders, stock and points never run like this.
    ALTER ROLE outbox_relay SET synchronous_commit = off;
    -- Its metrics tell how old the oldest transaction is, whoever has it: that keeps VACUUM from the outbox. Without this
    -- right they lack that one.
    GRANT pg_read_all_stats TO outbox_relay;
END
$$;
