-- Who may create tables and functions: the owner of a database alone. From PostgreSQL 15 on, a new server is like this. On
-- PostgreSQL 14, and on a server that was upgraded from an earlier one, everybody may. So run this there in each database:
-- `psql -d orders -f 4_schema.sql`, and so on. It can be repeated.
ALTER SCHEMA public OWNER TO pg_database_owner;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
