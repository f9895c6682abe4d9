-- Who may connect to which database. By default everybody may, and may make temporary tables there. Run it again at any time.
-- Grant CONNECT to further roles that have to read, such as those of dumps and of monitoring.
REVOKE CONNECT, TEMPORARY ON DATABASE orders FROM PUBLIC;
REVOKE CONNECT, TEMPORARY ON DATABASE inventory FROM PUBLIC;
REVOKE CONNECT, TEMPORARY ON DATABASE loyalty FROM PUBLIC;
GRANT CONNECT ON DATABASE orders TO order_service, outbox_relay;
GRANT CONNECT ON DATABASE inventory TO inventory_service, outbox_relay;
GRANT CONNECT ON DATABASE loyalty TO loyalty_service, outbox_relay;
