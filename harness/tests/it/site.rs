//! Databases, ports and log files for one system.

use harness::system::Layout;
use testkit::{TestDatabase, postgres::Server};

use testkit::Scratch;

/// What the processes of one test run on; everything in it is gone after the test.
pub(crate) struct Site {
    pub(crate) layout: Layout,
    pub(crate) orders: TestDatabase,
    pub(crate) inventory: TestDatabase,
    pub(crate) scratch: Scratch,
}

impl Site {
    /// With its schemas and the demo stock; `settings` are given to every process.
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
