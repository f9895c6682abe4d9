//! Who may call what: the names in certificates, and the methods that each may call.
//!
//! A certificate says who calls. That alone would let a relay of one service deliver the events of another, and a gateway
//! do whatever else is served where it calls. So a file says what each name may do, and all else is denied.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

const SOURCE: &str = "source=";
/// Of a name. It is kept with deeds, and goes into errors.
const NAME_CHARS_MAX: usize = 200;

/// What the names may do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Policy(HashMap<String, Grant>);

/// What one name may do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Grant {
    /// Such as `orders.v1.OrderService/CreateOrder`, or `orders.v1.OrderService/*`.
    methods: HashSet<String>,
    /// The services whose events it may deliver.
    sources: Vec<String>,
}

/// A caller whom the policy allows the method that he calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// The first name in his certificate by which he may.
    pub name: Arc<str>,
    /// The services whose events he may deliver.
    pub sources: Arc<[String]>,
}

impl Policy {
    /// Reads `NAME METHOD…` on each line, with `source=NAME` for each service whose events it may deliver. Lines of one
    /// name add up. Empty lines and those that begin with # are left out.
    pub(crate) fn parse(text: &str) -> Result<Self, Vec<String>> {
        let (mut grants, mut faults) = (HashMap::<_, Grant>::new(), Vec::new());
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default();
            if is_method(name) || name.starts_with(SOURCE) {
                faults.push(format!("line {number}: it must begin with a name, and {name:?} is none"));
            } else if name.chars().count() > NAME_CHARS_MAX {
                faults.push(format!("line {number}: a name may have {NAME_CHARS_MAX} characters"));
            }
            let grant = grants.entry(fold(name)).or_default();
            if words.clone().next().is_none() {
                faults.push(format!("line {number}: the name needs methods behind it, such as package.Service/*"));
            }
            for word in words {
                if let Some(source) = word.strip_prefix(SOURCE).filter(|source| !source.is_empty()) {
                    grant.sources.push(source.to_owned());
                } else if is_method(word) {
                    grant.methods.insert(word.to_owned());
                } else {
                    faults.push(format!(
                        "line {number}: {word:?} is neither a method (package.Service/Method or package.Service/*) nor \
                         source=NAME"
                    ));
                }
            }
        }
        if faults.is_empty() { Ok(Self(grants)) } else { Err(faults) }
    }

    /// Whether a caller with these names may call the method, by its full name. He may do what each name may that may call
    /// it.
    pub(crate) fn allow(&self, names: &[String], method: &str) -> Option<Allowed> {
        let (service, _) = method.split_once('/')?;
        let every = format!("{service}/*");
        let granting = names.iter().filter_map(|name| {
            let (name, grant) = self.0.get_key_value(&fold(name))?;
            (grant.methods.contains(method) || grant.methods.contains(&every)).then_some((name, &grant.sources))
        });
        let (granting, sources): (Vec<_>, Vec<_>) = granting.unzip();
        Some(Allowed {
            name: granting.first()?.as_str().into(),
            sources: sources.into_iter().flatten().cloned().collect(),
        })
    }
}

/// The name of a host may be in any case, and a URI may not.
fn fold(name: &str) -> String {
    if name.contains(':') { name.to_owned() } else { name.to_ascii_lowercase() }
}

fn is_method(word: &str) -> bool {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|each| each.is_ascii_alphanumeric() || each == '_');
    word.split_once('/')
        .is_some_and(|(service, method)| service.split('.').all(is_name) && (method == "*" || is_name(method)))
}

#[cfg(test)]
mod tests {
    use super::Policy;

    const TEXT: &str = "# who may do what\n\nOrders-Relay events.v1.EventReceiver/Deliver source=orders\n  \
        orders-relay  events.v1.EventReceiver/Describe source=returns\nspiffe://shop/gateway\torders.v1.OrderService/*\n\
        spiffe://shop/relay events.v1.EventReceiver/*\n";

    fn allows(names: &[&str], method: &str) -> Option<(String, Vec<String>)> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let allowed = Policy::parse(TEXT).unwrap().allow(&names, method)?;
        Some((allowed.name.to_string(), allowed.sources.to_vec()))
    }

    #[test]
    fn what_is_not_allowed_is_denied() {
        let relay = Some(("orders-relay".to_owned(), vec!["orders".to_owned(), "returns".to_owned()]));
        assert_eq!(allows(&["localhost", "ORDERS-relay"], "events.v1.EventReceiver/Deliver"), relay);
        assert_eq!(allows(&["orders-relay"], "events.v1.EventReceiver/Describe"), relay);
        let gateway = Some(("spiffe://shop/gateway".to_owned(), Vec::new()));
        assert_eq!(allows(&["orders-relay", "spiffe://shop/gateway"], "orders.v1.OrderService/CancelOrder"), gateway);
        // The names of one caller add up.
        let both = allows(&["spiffe://shop/relay", "orders-relay"], "events.v1.EventReceiver/Deliver").unwrap();
        assert_eq!(both, ("spiffe://shop/relay".to_owned(), vec!["orders".to_owned(), "returns".to_owned()]));

        for (names, method) in [
            (&["orders-relay"][..], "events.v1.EventReceiver/Recall"),
            (&["orders-relay"], "events.v1.EventReceiver/deliver"),
            (&["orders-relay"], "orders.v1.OrderService/CreateOrder"),
            (&["spiffe://SHOP/gateway"], "orders.v1.OrderService/CreateOrder"),
            (&["spiffe://shop/gateway"], "orders.v1.OrderServiceX/CreateOrder"),
            (&["spiffe://shop/gateway"], "orders.v1.OrderService"),
            (&["orders-relay.evil.example"], "events.v1.EventReceiver/Deliver"),
            (&["localhost"], "events.v1.EventReceiver/Deliver"),
            (&[], "events.v1.EventReceiver/Deliver"),
        ] {
            assert_eq!(allows(names, method), None, "{names:?} {method}");
        }
    }

    #[test]
    fn each_bad_word_of_a_file_is_named() {
        let neither = "is neither a method (package.Service/Method or package.Service/*) nor source=NAME";
        let faults = [
            "line 1: the name needs methods behind it, such as package.Service/*".to_owned(),
            format!("line 2: \"*\" {neither}"),
            format!("line 2: \"source=\" {neither}"),
            format!("line 3: \"orders.v1./Create\" {neither}"),
            format!("line 3: \"a.B/C/D\" {neither}"),
            "line 4: it must begin with a name, and \"a.B/C\" is none".to_owned(),
            "line 5: it must begin with a name, and \"source=a\" is none".to_owned(),
            "line 6: a name may have 200 characters".to_owned(),
        ];
        let text = format!(
            "relay\nrelay * source=\nrelay orders.v1./Create a.B/C/D a.B/C\na.B/C a.B/D\nsource=a a.B/C\n{} a.B/C",
            "x".repeat(201)
        );
        assert_eq!(Policy::parse(&text).unwrap_err(), faults);
        assert_eq!(Policy::parse("").unwrap(), Policy::default());
    }
}
