//! What a role may do in a database: as the catalog lists it, and as the server decides it.

use sqlx::{Connection, Executor, PgConnection, Postgres, QueryBuilder};

use crate::TestDatabase;

/// The rights of a role, and those of everybody (role 0). A line names an object, then each right, with the columns that it is
/// restricted to.
const RIGHTS: &str = "-- testkit: list rights
    WITH role AS (
        SELECT * FROM pg_roles WHERE rolname = $1
    ), schema AS (
        SELECT * FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
    ), listed (object, columns, acl) AS (
        SELECT 'DATABASE', NULL, coalesce(datacl, acldefault('d', datdba))
        FROM pg_database WHERE datname = current_database()
        UNION ALL
        SELECT 'SCHEMA ' || nspname, NULL, coalesce(nspacl, acldefault('n', nspowner)) FROM schema
        UNION ALL
        SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || relname, NULL,
            coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::\"char\", relowner))
        FROM pg_class JOIN schema ON schema.oid = relnamespace WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        UNION ALL
        SELECT 'TABLE ' || relname, attname, attacl
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid JOIN schema ON schema.oid = relnamespace
        WHERE attacl IS NOT NULL
        UNION ALL
        SELECT 'FUNCTION ' || proname, NULL, coalesce(proacl, acldefault('f', proowner))
        FROM pg_proc JOIN schema ON schema.oid = pronamespace
    ), granted AS (
        SELECT object, privilege_type || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
            || coalesce(' (' || string_agg(columns, ', ' ORDER BY columns) || ')', '') AS rights
        FROM listed CROSS JOIN aclexplode(acl)
        WHERE grantee = 0 OR grantee = (SELECT oid FROM role)
        GROUP BY object, privilege_type, is_grantable, columns IS NULL
    )
    SELECT line COLLATE \"C\" FROM (
        SELECT object || ': ' || string_agg(rights, ', ' ORDER BY rights) FROM granted GROUP BY object
        UNION ALL
        SELECT 'MEMBER OF ' || of.rolname
        FROM pg_auth_members JOIN pg_roles AS of ON of.oid = roleid WHERE member = (SELECT oid FROM role)
        UNION ALL
        SELECT 'MORE THAN A ROLE' FROM role
        WHERE rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls
    ) AS lines (line) ORDER BY 1";

impl TestDatabase {
    /// All rights of a role in this database, one line for each object.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn rights_of(&self, role: &str) -> String {
        let lines: Vec<String> =
            sqlx::query_scalar(RIGHTS).bind(role).fetch_all(&self.pool().await).await.expect("a list of rights");
        lines.join("\n")
    }

    /// The SQLSTATE with which the server ends a statement of a role, or that role's attempt to connect. 00000 is success.
    ///
    /// # Panics
    /// If the server does not answer.
    pub async fn sqlstate(&self, role: &str, statement: &str) -> String {
        let execute = async {
            let mut connection = PgConnection::connect(&self.url_as(role)).await?;
            let mut statement = QueryBuilder::<Postgres>::new(statement);
            connection.execute(statement.build().persistent(false)).await
        };
        match execute.await {
            Ok(_) => "00000".to_owned(),
            Err(error) => {
                let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
                code.unwrap_or_else(|| panic!("no SQLSTATE: {error}")).into_owned()
            }
        }
    }
}
