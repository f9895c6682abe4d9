//! Databases, ports and log files for one system.

use harness::system::Layout;
use testkit::{Scratch, TestDatabase, postgres::Server, processes::free_port};

/// Databases, ports and logs of one test, deleted after it.
pub(crate) struct Site {
    pub(crate) layout: Layout,
    pub(crate) orders: TestDatabase,
    pub(crate) inventory: TestDatabase,
    /// Only of a site with loyalty.
    pub(crate) loyalty: Option<TestDatabase>,
    _scratch: Scratch,
}

impl Site {
    /// Migrates both databases and adds the demo stock. Every process gets `settings` as environment variables.
    pub(crate) async fn prepare(settings: &[(&str, &str)]) -> Self {
        Self::prepare_with(None, settings).await
    }

    /// The same with loyalty, as a second subscriber of the orders' events.
    pub(crate) async fn prepare_with_loyalty(settings: &[(&str, &str)]) -> Self {
        Self::prepare_with(Some(TestDatabase::create("loyalty_owner", &[]).await), settings).await
    }

    async fn prepare_with(loyalty: Option<TestDatabase>, settings: &[(&str, &str)]) -> Self {
        let orders = TestDatabase::create("orders_owner", &[]).await;
        let inventory = TestDatabase::create("inventory_owner", &[]).await;
        let server = Server::parse(&std::env::var("POSTGRES_URL").unwrap()).unwrap();
        let scratch = Scratch::new();
        let mut layout = Layout::on_free_ports(server, orders.name(), inventory.name(), &scratch).unwrap();
        if let Some(loyalty) = &loyalty {
            layout = layout.with_loyalty(loyalty.name(), [free_port().unwrap(), free_port().unwrap()]);
        }
        layout.settings.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        layout.prepare().await.unwrap();
        Self { layout, orders, inventory, loyalty, _scratch: scratch }
    }

    pub(crate) fn loyalty(&self) -> &TestDatabase {
        self.loyalty.as_ref().unwrap()
    }
}
