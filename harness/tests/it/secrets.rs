//! No secret is in anything that a process says. Each secret is a text that is nowhere else, and all that is said is searched
//! for it: at the most verbose level, and while much goes wrong.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use chassis::{Tls, TlsFiles, connect_lazily};
use harness::{
    identities::{CUSTOMERS, Identities, OPERATORS},
    stress::{Load, place_orders, wait_until_delivered},
    system::{Layout, Service, stop},
    target::Target,
};
use proto::{
    events::v1::{DescribeRequest, event_receiver_client::EventReceiverClient},
    inventory::v1::{AdjustStockRequest, inventory_service_client::InventoryServiceClient},
    orders::v1::{GetOrderRequest, order_service_client::OrderServiceClient},
    relay::v1::{GetStatusRequest, relay_admin_client::RelayAdminClient},
};
use testkit::{
    OwnServer, Scratch, TestDatabase,
    certificates::{Authority, replace},
    http,
    processes::{Process, binary, free_port},
};
use tokio::{process::Command, time::timeout};
use tonic::{
    Request,
    codegen::http::Request as HttpRequest,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use crate::{
    tls::{LIMIT, eventually},
    traces::Collector,
};

/// What is kept of the surroundings of a secret that was said.
const AROUND: usize = 120;
const SERVICES: [(Service, &str, &str); 3] = [
    (Service::Orders, "order_service", "ORDERS_DATABASE_URL"),
    (Service::Inventory, "inventory_service", "INVENTORY_DATABASE_URL"),
    (Service::Loyalty, "loyalty_service", "LOYALTY_DATABASE_URL"),
];
const OWNERS: [&str; 3] = ["orders_owner", "inventory_owner", "loyalty_owner"];
/// Those of RelayAdmin, which the console calls.
const METHODS: [&str; 15] = [
    "GetStatus",
    "ListDeadEvents",
    "GetDeadEvent",
    "GetJourney",
    "Diagnose",
    "GroupDeadEvents",
    "GetBlastRadius",
    "ListDeeds",
    "RequeueDeadEvents",
    "DiscardDeadEvents",
    "DiscardDeadEvent",
    "RestoreDiscardedEvent",
    "Pause",
    "Resume",
    "UndoDeed",
];

/// All secrets, and all that was said.
#[derive(Default)]
struct Record {
    secrets: Vec<(String, String)>,
    said: Vec<(String, String)>,
}

impl Record {
    /// A new text, which is secret.
    fn secret(&mut self, what: &str) -> String {
        let text = format!("canary{}", Uuid::new_v4().simple());
        self.secrets.push((what.to_owned(), text.clone()));
        text
    }

    /// The lines of a private key.
    fn secret_key(&mut self, what: &str, pem: &str) {
        let key = pem.split("PRIVATE KEY-----").nth(1).unwrap();
        let lines: Vec<&str> = key.lines().filter(|line| line.len() > 20).collect();
        assert!(lines.len() > 1, "{what} has no key");
        self.secrets.extend(lines.into_iter().map(|line| (format!("the key of {what}"), line.to_owned())));
    }

    fn said(&mut self, by: impl Into<String>, text: impl Into<String>) {
        self.said.push((by.into(), text.into()));
    }

    /// Each secret that was said, with its surroundings.
    fn leaks(&self) -> Vec<String> {
        let mut leaks = Vec::new();
        for (what, secret) in &self.secrets {
            for written in forms_of(secret) {
                for (by, text) in &self.said {
                    if let Some(at) = text.find(&written) {
                        let (from, to) = (at.saturating_sub(AROUND), (at + written.len() + AROUND).min(text.len()));
                        let around = String::from_utf8_lossy(&text.as_bytes()[from..to]).into_owned();
                        leaks.push(format!("{by} says {what}: …{around}…"));
                    }
                }
            }
        }
        leaks
    }
}

/// As text, and as programs print bytes.
fn forms_of(secret: &str) -> Vec<String> {
    let numbers: Vec<String> = secret.bytes().map(|byte| byte.to_string()).collect();
    let digits = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    let mut forms = vec![secret.to_owned(), numbers.join(", "), digits];
    forms.extend((0..3).map(|before| in_base64(secret, before)));
    forms
}

/// The characters that depend on the secret alone, in a text where it follows so many bytes, and perhaps others follow it.
fn in_base64(secret: &str, before: usize) -> String {
    let encoded = BASE64_STANDARD_NO_PAD.encode(" ".repeat(before) + secret);
    let whole = (before + secret.len()) * 8 / 6;
    encoded[(before * 8).div_ceil(6)..whole].to_owned()
}

#[test]
fn a_secret_is_found_however_it_is_written() {
    for text in [
        "the password is canary7.",
        r"b[99, 97, 110, 97, 114, 121, 55]",
        r"\x63616e61727937",
        "Basic Y2FuYXJ5Nw==",
        &format!("Basic {}", BASE64_STANDARD_NO_PAD.encode("me:canary7")),
        &format!("Basic {}", BASE64_STANDARD_NO_PAD.encode("you:canary7:")),
        &format!("Basic {}", BASE64_STANDARD_NO_PAD.encode("them:canary7!!")),
    ] {
        let mut record = Record { secrets: vec![("a secret".into(), "canary7".into())], ..Record::default() };
        record.said("a test", "canary8");
        assert_eq!(record.leaks(), [""; 0]);
        record.said("a test", text);
        assert_eq!(record.leaks().len(), 1, "{text}");
    }
}

/// The secrets of one system.
struct Passwords {
    services: Vec<String>,
    relay: String,
    owners: Vec<String>,
    operator: String,
    collector: String,
    /// For a collector that is away.
    away: String,
}

struct Guarded {
    // First, so that they end before their server does.
    processes: Vec<Process>,
    record: Record,
    server: OwnServer,
    layout: Layout,
    identities: Identities,
    passwords: Passwords,
    collector: Collector,
    endpoint: String,
    _databases: Vec<TestDatabase>,
    scratch: Scratch,
}

impl Guarded {
    async fn prepare(server: OwnServer) -> Self {
        let (mut record, scratch) = (Record::default(), Scratch::new());
        let mut databases = Vec::new();
        for owner in OWNERS {
            databases.push(server.database(owner, &[]).await);
        }
        let [orders, inventory, loyalty] = [0, 1, 2].map(|at: usize| databases[at].name().to_owned());
        let logs = scratch.join("logs");
        let mut layout = Layout::on_free_ports(server.server().clone(), &orders, &inventory, &logs).unwrap();
        layout = layout.with_loyalty(&loyalty, [free_port().unwrap(), free_port().unwrap()]);
        layout.prepare().await.unwrap();
        let identities = Identities::make(&scratch.join("certificates"), &Authority::new().unwrap()).unwrap();
        for name in Service::ALL.map(Service::name).into_iter().chain([CUSTOMERS, OPERATORS]) {
            record.secret_key(name, &fs::read_to_string(identities.own_file(name)).unwrap());
        }
        layout.identities = Some(identities.clone());
        layout.serves_ops = true;
        let passwords = set_passwords(&server, &mut record).await;
        let (collector, endpoint) = Collector::start().await;
        let processes = Vec::new();
        let _databases = databases;
        Self { record, server, layout, identities, passwords, collector, endpoint, processes, _databases, scratch }
    }

    fn url(&self, role: &str, password: Option<&str>, database: &str) -> String {
        let password = password.map(|password| format!(":{password}")).unwrap_or_default();
        format!("postgres://{role}{password}@{}/{database}", self.server.address())
    }

    fn database(&self, service: Service) -> &str {
        match service {
            Service::Orders | Service::OrdersRelay => &self.layout.orders,
            Service::Inventory | Service::InventoryRelay => &self.layout.inventory,
            Service::Loyalty => &self.layout.loyalty.as_ref().unwrap().database,
        }
    }

    fn relay_url(&self) -> String {
        self.url("outbox_relay", Some(&self.passwords.relay), &self.layout.orders)
    }

    fn file(&self, name: &str, text: &str, mode: u32) -> PathBuf {
        let (file, new) = (self.scratch.join(name), self.scratch.join(format!("{name}.new")));
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, Permissions::from_mode(mode)).unwrap();
        fs::rename(new, &file).unwrap();
        file
    }

    fn collector_of(&self, service: Service) -> String {
        let away = format!("http://loyalty:{}@127.0.0.1:1", self.passwords.away);
        if service == Service::Loyalty { away } else { self.endpoint.clone() }
    }

    /// Passwords are in a URL, in the environment, and in a file.
    fn settings_of(&self, service: Service) -> Vec<(String, String)> {
        let mut settings = vec![
            ("RUST_LOG", "trace".to_owned()),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.collector_of(service)),
            ("OTEL_EXPORTER_OTLP_HEADERS", format!("x-key={}", self.passwords.collector)),
            ("OTEL_TRACES_SAMPLER", "parentbased_always_on".into()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50".into()),
        ];
        let database = self.database(service);
        let by_file = |url: &str, file: &Path| {
            vec![(url.to_owned(), self.url("outbox_relay", None, database)), path("DATABASE_PASSWORD_FILE", file)]
        };
        let mut more = match SERVICES.iter().position(|(of, ..)| *of == service) {
            Some(2) => {
                settings.push(("PGPASSWORD", self.passwords.services[2].clone()));
                vec![(SERVICES[2].2.to_owned(), self.url(SERVICES[2].1, None, database))]
            }
            Some(at) => {
                let url = self.url(SERVICES[at].1, Some(&self.passwords.services[at]), database);
                vec![(SERVICES[at].2.to_owned(), url)]
            }
            None if service == Service::OrdersRelay => {
                vec![
                    ("RELAY_DATABASE_URL".to_owned(), self.relay_url()),
                    path("RELAY_TOKEN_FILE", &self.scratch.join("tokens")),
                ]
            }
            None => by_file("RELAY_DATABASE_URL", &self.scratch.join("password")),
        };
        more.extend(settings.into_iter().map(|(name, value)| (name.to_owned(), value)));
        more
    }

    async fn start(&mut self) {
        self.file("password", &self.passwords.relay, 0o600);
        let made = Command::new(binary("outbox-relay").unwrap()).args(["token", "operator", "Ann B."]).output();
        let made = String::from_utf8(made.await.unwrap().stdout).unwrap();
        let after = |label: &str| made.lines().find_map(|line| line.strip_prefix(label)).unwrap().trim().to_owned();
        self.passwords.operator = after("the token:");
        self.record.secrets.push(("the token of an operator".into(), self.passwords.operator.clone()));
        self.file("tokens", &after("its line in the token file:"), 0o600);
        for service in self.layout.services() {
            let mut layout = self.layout.clone();
            layout.settings.extend(self.settings_of(service));
            self.processes.push(layout.start(service).await.unwrap());
        }
    }

    fn target(&self) -> Target {
        let mut target = self.layout.target().unwrap();
        let url = |at: usize, service| {
            self.url(OWNERS[at], Some(&self.passwords.owners[at]), self.database(service)).parse().unwrap()
        };
        target.databases.orders_database_url = url(0, Service::Orders);
        target.databases.inventory_database_url = url(1, Service::Inventory);
        target.databases.loyalty_database_url = url(2, Service::Loyalty);
        target
    }

    /// Who has no certificate.
    fn nobody(&self) -> TlsFiles {
        TlsFiles { tls_cert_file: None, ..self.identities.files(OPERATORS) }
    }

    fn log_of(&self, service: Service) -> String {
        fs::read_to_string(self.layout.log(service)).unwrap()
    }

    async fn logs(&self, service: Service, text: &str) {
        eventually(text, async || self.log_of(service).contains(text)).await;
    }

    /// Runs a program to its end, and keeps what it says. Returns whether it succeeded.
    async fn run(&mut self, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> (bool, String) {
        let mut command = Command::new(binary(program).unwrap());
        command.args(arguments).env("RUST_LOG", "trace").env_remove("POSTGRES_URL").envs(environment.iter().copied());
        let output = timeout(LIMIT, command.kill_on_drop(true).output()).await.expect("an end").unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        // What it was told is no part of what it says.
        self.record.said(format!("{program} {}", arguments.first().unwrap_or(&"")), said.clone());
        (output.status.success(), said)
    }

    async fn succeeds(&mut self, program: &str, arguments: &[&str], environment: &[(&str, &str)]) {
        let (succeeded, said) = self.run(program, arguments, environment).await;
        assert!(succeeded, "{program} {arguments:?}: {said}");
    }

    /// The error has to be the one that is meant.
    async fn fails(&mut self, program: &str, arguments: &[&str], environment: &[(&str, &str)], why: &str) {
        let (succeeded, said) = self.run(program, arguments, environment).await;
        assert!(!succeeded && said.contains(why), "{program} {arguments:?}, not for {why:?}: {said}");
    }
}

fn path(name: &str, file: &Path) -> (String, String) {
    (name.to_owned(), file.to_str().unwrap().to_owned())
}

/// On a server of the test's own: others would know the roles by their old passwords.
async fn set_passwords(server: &OwnServer, record: &mut Record) -> Passwords {
    let mut make = async |role: &str| {
        let password = record.secret(&format!("the password of {role}"));
        server.execute(&format!("ALTER ROLE {role} PASSWORD '{password}'")).await;
        password
    };
    let (mut services, mut owners) = (Vec::new(), Vec::new());
    for (_, role, _) in SERVICES {
        services.push(make(role).await);
    }
    for role in OWNERS {
        owners.push(make(role).await);
    }
    let relay = make("outbox_relay").await;
    let [collector, away] = ["the key of the collector", "the password of a collector"].map(|what| record.secret(what));
    Passwords { services, relay, owners, operator: String::new(), collector, away }
}

fn connect(address: impl std::fmt::Display, files: &TlsFiles) -> Channel {
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
    connect_lazily(&endpoint, &Tls::read(files).unwrap())
}

/// What those say who are asked for something: callers, operators, browsers, Prometheus, and strangers.
impl Guarded {
    async fn use_all(&mut self) -> String {
        let target = self.target();
        place_orders(&target, Load { orders: 20, concurrency: 4, retry_for: Duration::ZERO }).await.unwrap();
        wait_until_delivered(&target.databases, LIMIT).await.unwrap();
        self.record.said("the target of the harness", format!("{target:?}"));
        let order_id: Uuid = sqlx::query_scalar("-- test: find an order\nSELECT order_id FROM orders LIMIT 1")
            .fetch_one(&mut target.databases.orders().await.unwrap())
            .await
            .unwrap();
        order_id.to_string()
    }

    /// All kinds of calls, allowed and denied, with the statuses that are answered.
    async fn call(&mut self, order_id: &str) {
        let (orders, events) = (self.layout.order_service, self.layout.order_events);
        let stranger = Scratch::new();
        let others = Identities::make(&stranger.join("certificates"), &Authority::new().unwrap()).unwrap();
        let of_another = TlsFiles { tls_ca_file: Some(self.identities.ca_file()), ..others.files(CUSTOMERS) };
        for (who, files) in [
            ("customers", self.identities.files(CUSTOMERS)),
            ("a relay", self.identities.files("orders-relay")),
            ("nobody", self.nobody()),
            ("a stranger", of_another),
        ] {
            let asked = GetOrderRequest { order_id: order_id.to_owned() };
            let got = OrderServiceClient::new(connect(orders, &files)).get_order(asked).await;
            let described = EventReceiverClient::new(connect(events, &files)).describe(DescribeRequest {}).await;
            let wrong = AdjustStockRequest::default();
            let inventory = connect(self.layout.inventory_service, &files);
            let adjusted = InventoryServiceClient::new(inventory).adjust_stock(wrong).await;
            assert!(adjusted.is_err() && got.is_ok() == (who == "customers"), "{who}: {got:?}");
            self.record.said(format!("what {who} is answered"), format!("{got:?} {described:?} {adjusted:?}"));
        }
    }

    /// With the right token, a wrong one, one in the wrong place, and none.
    async fn look(&mut self, token: &str) {
        let wrong = self.record.secret("a token that nobody knows");
        let headers = [String::new(), format!("Bearer {token}"), format!("Bearer {wrong}"), format!("Basic {token}")];
        let paths = ["/console/", "/console/console.js", "/console/none", "/api/me", "/api/none"];
        let channel = connect(self.layout.orders_relay, &self.nobody());
        for header in headers {
            for path in paths {
                self.ask(&channel, "GET", path, &header, "").await;
            }
            for method in METHODS {
                self.ask(&channel, "POST", &format!("/api/{method}"), &header, "{}").await;
            }
            self.ask(&channel, "POST", "/api/GetStatus", &header, "no JSON").await;
            let mut relay = RelayAdminClient::new(channel.clone());
            let mut request = Request::new(GetStatusRequest::default());
            if !header.is_empty() {
                request.metadata_mut().insert("authorization", header.parse().unwrap());
            }
            let answer = relay.get_status(request).await;
            assert_eq!(answer.is_ok(), header == format!("Bearer {token}"), "{answer:?}");
            self.record.said("RelayAdmin", format!("{answer:?}"));
        }
        for service in self.layout.services() {
            let address = self.layout.ops_address(service).unwrap().unwrap();
            for path in ["/metrics", "/livez", "/readyz", "/none"] {
                let page = http::get_by(&self.nobody(), address, path).await.unwrap();
                self.record.said(format!("{path} of {}", service.name()), page);
            }
        }
    }

    async fn ask(&mut self, channel: &Channel, method: &str, path: &str, authorization: &str, body: &str) {
        let mut request = HttpRequest::builder().method(method);
        request = request.uri(format!("https://{}{path}", self.layout.orders_relay));
        request = request.header("content-type", "application/json");
        if !authorization.is_empty() {
            request = request.header("authorization", authorization);
        }
        let answer = http::ask_by(channel.clone(), request.body(body.to_owned()).unwrap()).await.unwrap();
        self.record.said(format!("{method} {path}"), format!("{answer:?}"));
    }

    /// What an operator and an owner run.
    async fn operate(&mut self, order_id: &str) {
        let (url, bundle) = (self.relay_url(), self.scratch.join("bundle.json"));
        let files = self.identities.variables("orders-relay").unwrap();
        let mut environment: Vec<(&str, &str)> = files.iter().map(|(name, file)| (*name, file.as_str())).collect();
        environment.push(("RELAY_DATABASE_URL", &url));
        for arguments in [
            &["status"][..],
            &["status", "--json"],
            &["subscriptions", "--json"],
            &["journey", order_id],
            &["journey", "--json", order_id],
            &["why", order_id],
            &["pause", "--subscription", "inventory", "--reason", "a test", "--by", "a test"],
            &["resume", "--subscription", "inventory", "--by", "a test"],
            &["deeds", "--json"],
            &["dead", "list", "--json"],
        ] {
            self.succeeds("outbox-relay", arguments, &environment).await;
        }
        for arguments in [&["doctor"][..], &["doctor", "--json"], &["doctor", "--bundle", bundle.to_str().unwrap()]] {
            self.run("outbox-relay", arguments, &environment).await;
        }
        let bundled = fs::read_to_string(bundle).unwrap();
        self.record.said("the bundle of doctor", bundled);
        let orders = self.url(OWNERS[0], Some(&self.passwords.owners[0]), &self.layout.orders);
        let inventory = self.url(OWNERS[1], None, &self.layout.inventory);
        let loyalty = self.url(OWNERS[2], Some(&self.passwords.owners[2]), self.database(Service::Loyalty));
        let (inventory_password, address) = (self.passwords.owners[1].clone(), self.server.address());
        let (host, port) = address.split_once(':').unwrap();
        let line = format!("{host}:{port}:*:{}:{inventory_password}\n", OWNERS[1]);
        let passfile = self.file("pgpass", &line, 0o600);
        let environment = [
            (SERVICES[0].2, orders.as_str()),
            (SERVICES[1].2, &inventory),
            (SERVICES[2].2, &loyalty),
            ("PGPASSFILE", passfile.to_str().unwrap()),
        ];
        for program in ["order-service", "inventory-service", "loyalty-service"] {
            self.succeeds(program, &["migrate"], &environment).await;
        }
        self.succeeds("harness", &["audit"], &environment).await;
        let owner = self.file("owner", &self.passwords.owners[0], 0o600);
        let without = self.url(OWNERS[0], None, &self.layout.orders);
        let environment = [(SERVICES[0].2, without.as_str()), ("DATABASE_PASSWORD_FILE", owner.to_str().unwrap())];
        let erase = ["erase-customer", "nobody", "--by", "a test", "--reason", "a test"];
        self.succeeds("order-service", &erase, &environment).await;
        self.succeeds("loyalty-service", &erase, &[(SERVICES[2].2, &loyalty)]).await;
    }

    /// The environment is full of secrets, and help shows where values come from.
    async fn help(&mut self) {
        let (url, superuser) = (self.relay_url(), self.record.secret("the password of the superuser"));
        let superuser = format!("postgres://postgres:{superuser}@127.0.0.1:1/postgres");
        let urls = [SERVICES[0].2, SERVICES[1].2, SERVICES[2].2, "RELAY_DATABASE_URL"];
        let listeners = ["ORDERS_LISTEN_DATABASE_URL", "RELAY_LISTEN_DATABASE_URL"];
        let mut environment: Vec<(&str, &str)> = urls.into_iter().chain(listeners).map(|name| (name, &*url)).collect();
        environment.push(("POSTGRES_URL", &superuser));
        for (program, commands) in [
            ("order-service", &["serve", "migrate", "resend", "erase-customer", "healthcheck"][..]),
            ("inventory-service", &["serve", "migrate", "seed", "resend", "healthcheck"]),
            ("loyalty-service", &["serve", "migrate", "erase-customer", "healthcheck"]),
            ("outbox-relay", &["serve", "status", "doctor", "journey", "why", "dead", "pause", "undo", "subscribe"]),
            ("harness", &["up", "demo", "stress", "replay", "failover", "audit", "upgrade", "with-postgres"]),
        ] {
            self.succeeds(program, &["--help"], &environment).await;
            for command in commands {
                self.succeeds(program, &[command, "--help"], &environment).await;
                self.succeeds(program, &[command, "-h"], &environment).await;
            }
        }
    }
}

/// What is said about what goes wrong.
impl Guarded {
    /// Commands that are given what cannot be used.
    async fn ask_wrongly(&mut self) {
        let wrong = self.record.secret("a wrong password");
        let (user, address) = (format!("outbox_relay:{wrong}"), self.server.address());
        let refused = format!("postgres://{user}@{address}/{}", self.layout.orders);
        self.fails("outbox-relay", &["status", "--database-url", &refused], &[], "authentication failed").await;
        let serve = ["serve", "--listen", "127.0.0.1:0", "--events-listen", "127.0.0.1:0", "--database-url", &refused];
        self.fails("order-service", &serve, &[], "authentication failed").await;
        let audit = ["audit", "--orders-database-url", &refused];
        self.fails("harness", &audit, &[], "authentication failed").await;
        let nobody = format!("postgres://{user}@127.0.0.1:1/orders");
        self.fails("outbox-relay", &["status"], &[("RELAY_DATABASE_URL", &nobody)], "refused").await;
        for url in [
            format!("postgres://{user}@{address}:port/orders"),
            format!("mysql://{user}@{address}/orders"),
            format!("postgres://{user}@{address}/orders?sslrootcert=ca.pem"),
            format!("postgres://{user}@{address}/orders?target_session_attrs=any"),
            format!("{user}@{address}"),
            format!("postgres:///orders?host=one,other&password={wrong}"),
            format!("host={address} user=outbox_relay password={wrong}"),
        ] {
            self.fails("outbox-relay", &["status", "--database-url", &url], &[], "error: --database-url").await;
            self.fails("outbox-relay", &["status"], &[("RELAY_DATABASE_URL", &url)], "error: --database-url").await;
            self.fails("order-service", &["migrate"], &[("ORDERS_DATABASE_URL", &url)], "error: --database-url").await;
            self.fails("harness", &["audit"], &[("ORDERS_DATABASE_URL", &url)], "error: --orders-database-url").await;
            // Where no URL belongs.
            self.fails("outbox-relay", &["status", &url], &[], "error: ").await;
            self.fails("outbox-relay", &[&url], &[], "error: ").await;
            self.fails("order-service", &["migrate", &format!("--database-ur={url}")], &[], "error: ").await;
            self.fails("harness", &["up", &url], &[], "error: ").await;
            self.fails("harness", &["demo", &format!("--secure={url}")], &[], "error: ").await;
            self.fails("harness", &["audit", &format!("--orders-database-url{url}")], &[], "error: ").await;
        }
        let token = self.passwords.operator.clone();
        self.fails("outbox-relay", &["status", &token], &[], "error: ").await;
    }

    /// Files that hold a secret, and cannot be used.
    async fn give_broken_files(&mut self) {
        let url = self.relay_url();
        let by =
            |name: &'static str, file: &Path| [("RELAY_DATABASE_URL", url.clone()), (name, file.display().to_string())];
        let without = self.url("outbox_relay", None, &self.layout.orders);
        let wrong = self.record.secret("a password in a broken file");
        for (name, text, mode, why) in [
            ("open", format!("{wrong}\n"), 0o644, "everybody may read"),
            ("two lines", format!("{wrong}\n{wrong}\n"), 0o600, "holds something else"),
            ("wrong", wrong.clone(), 0o600, "authentication failed"),
        ] {
            let file = self.file(name, &text, mode);
            let environment =
                [("RELAY_DATABASE_URL", without.as_str()), ("DATABASE_PASSWORD_FILE", file.to_str().unwrap())];
            self.fails("outbox-relay", &["status"], &environment, why).await;
        }
        let lines = self.file("token", &format!("operator {} Ann B.\n", self.passwords.operator), 0o600);
        let [url, tokens] = by("RELAY_TOKEN_FILE", &lines);
        let route = format!("a=http://relay:{}@127.0.0.1:1", self.record.secret("a password in a route"));
        let environment = [(url.0, url.1.as_str()), (tokens.0, &tokens.1), ("RELAY_ROUTES", "a=http://127.0.0.1:1")];
        let serve = ["serve", "--source", "order-service"];
        self.fails("outbox-relay", &serve, &environment, "--token-file").await;
        let environment = [("RELAY_DATABASE_URL", self.relay_url()), ("RELAY_ROUTES", route)];
        let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
        self.fails("outbox-relay", &serve, &environment, "not the URL of a receiver").await;

        let own = fs::read_to_string(self.identities.own_file("order-service")).unwrap();
        let other = fs::read_to_string(self.identities.own_file("inventory-service")).unwrap();
        let (key, certificate) = own.split_at(own.find("-----BEGIN CERTIFICATE").unwrap());
        let ca = self.identities.ca_file().display().to_string();
        for (name, text) in [
            ("no end.pem", format!("{certificate}{}", key.replace("-----END", "-----ENDE"))),
            ("no base64.pem", format!("{certificate}{}", key.replacen('\n', "\n!!!!", 2))),
            ("not the key.pem", format!("{certificate}{other}")),
            ("no key.pem", key.lines().skip(1).collect::<Vec<_>>().join("\n")),
        ] {
            let file = self.file(name, &text, 0o600).display().to_string();
            let arguments = ["serve", "--tls-cert-file", &file, "--tls-ca-file", &ca];
            let url = [("ORDERS_DATABASE_URL", url.1.as_str()), ("ORDER_SERVICE_LISTEN", "127.0.0.1:0")];
            self.fails(
                "order-service",
                &arguments,
                &[url[0], url[1], ("ORDER_SERVICE_EVENTS_LISTEN", "127.0.0.1:0")],
                "cannot use",
            )
            .await;
        }
    }

    /// Files, passwords and databases that processes lose while they run.
    async fn break_what_runs(&mut self) {
        let key = fs::read_to_string(self.identities.own_file("inventory-service")).unwrap();
        replace(&self.identities.own_file("inventory-service"), &key[..key.len() / 2]).unwrap();
        self.logs(Service::Inventory, "what they held before is kept").await;
        let token = self.passwords.operator.clone();
        self.file("tokens", &format!("operator {token} Ann B.\n"), 0o600);
        let channel = connect(self.layout.orders_relay, &self.nobody());
        self.ask(&channel, "POST", "/api/GetStatus", &format!("Bearer {token}"), "{}").await;
        self.logs(Service::OrdersRelay, "the token file cannot be used").await;

        let later = self.record.secret("a new password");
        for role in ["order_service", "inventory_service", "loyalty_service", "outbox_relay"] {
            self.server.execute(&format!("ALTER ROLE {role} PASSWORD '{later}'")).await;
        }
        self.server
            .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename NOT LIKE 'postgres'")
            .await;
        for service in self.layout.services() {
            self.logs(service, "authentication failed").await;
        }
        self.file("password", &later, 0o644);
        self.logs(Service::InventoryRelay, "everybody may read the password file").await;
        let asked = GetOrderRequest { order_id: Uuid::now_v7().to_string() };
        let customers = self.identities.files(CUSTOMERS);
        let answer = OrderServiceClient::new(connect(self.layout.order_service, &customers)).get_order(asked).await;
        self.record.said("order-service without its database", format!("{:?}", answer.unwrap_err()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_in_anything_that_a_process_says() {
    let Some(server) = OwnServer::start().await else { return };
    let mut guarded = Guarded::prepare(server).await;
    guarded.start().await;
    let order_id = guarded.use_all().await;
    guarded.call(&order_id).await;
    let token = guarded.passwords.operator.clone();
    guarded.look(&token).await;
    guarded.operate(&order_id).await;
    guarded.help().await;
    guarded.ask_wrongly().await;
    guarded.give_broken_files().await;
    guarded.break_what_runs().await;
    stop(std::mem::take(&mut guarded.processes)).await.unwrap();

    let spans = guarded.collector.all();
    assert!(!spans.is_empty(), "no span was sent");
    assert!(spans.iter().all(|sent| sent.key.as_ref() == Some(&guarded.passwords.collector)), "the key is not sent");
    let spans: Vec<_> = spans.into_iter().map(|sent| sent.span).collect();
    guarded.record.said("a trace", format!("{spans:?}"));
    for service in guarded.layout.services() {
        let log = guarded.log_of(service);
        assert!(log.contains(r#""level":"TRACE""#), "{} has not said all", service.name());
        guarded.record.said(format!("the log of {}", service.name()), log);
    }
    let leaks = guarded.record.leaks();
    assert!(leaks.is_empty(), "{} secrets were said:\n{}", leaks.len(), leaks.join("\n"));
}
