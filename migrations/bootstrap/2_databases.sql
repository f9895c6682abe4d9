-- One database per service. They may be on servers of their own: nothing joins them but events.
CREATE DATABASE orders OWNER orders_owner;
CREATE DATABASE inventory OWNER inventory_owner;
CREATE DATABASE loyalty OWNER loyalty_owner;
