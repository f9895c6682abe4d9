//! Databases, ports and log files for one system.

use harness::system::Layout;
use testkit::{TestDatabase, postgres::Server};

use testkit::Scratch;

/// Databases, ports and logs of one test, deleted after it.
pub(crate) struct Site {
    pub(crate) layout: Layout,
    pub(crate) orders: TestDatabase,
    pub(crate) inventory: TestDatabase,
    pub(crate) scratch: Scratch,
}

impl Site {
    /// Migrates both databases and adds the demo stock. Every process gets `settings` as environment variables.
    pub(crate) async fn prepare(settings: &[(&str, &str)]) -> Self {
        let orders = TestDatabase::create("orders_owner", &[]).await;
        let inventory = TestDatabase::create("inventory_owner", &[]).await;
        let server = Server::parse(&std::env::var("POSTGRES_URL").unwrap()).unwrap();
        let scratch = Scratch::new();
        let mut layout = Layout::on_free_ports(server, orders.name(), inventory.name(), &scratch).unwrap();
        layout.settings.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        layout.prepare().await.unwrap();
        Self { layout, orders, inventory, scratch }
    }
}
