-- The two databases. They may be on two servers: nothing joins them but events.
CREATE DATABASE orders OWNER orders_owner;
CREATE DATABASE inventory OWNER inventory_owner;
