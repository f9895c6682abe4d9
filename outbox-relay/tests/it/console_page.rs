//! The console's page, in a browser.

use std::{env, path::Path, time::Duration};

use fantoccini::{Client, ClientBuilder, Locator, elements::Element, wd::Capabilities};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use testkit::{
    Scratch,
    processes::{Process, free_port},
};
use tokio::time::{Instant, sleep};

use crate::{
    console::Tokens,
    operator::{Operator, count_dead, insert_dead_with_successors, insert_many_dead, mark_dead},
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
    wait::{AMPLE, until},
};

/// A browser that shows the console of a relay. Both end when it is dropped.
struct Browser {
    page: Client,
    relay: Relay,
    _driver: Process,
    _scratch: Scratch,
}

impl Browser {
    /// `None` if the machine has no browser: CHROMEDRIVER names the program that drives one.
    async fn open(outbox: &Outbox, receiver: &Receiver, tokens: &Tokens) -> Option<Self> {
        let Ok(program) = env::var("CHROMEDRIVER") else {
            eprintln!("skipped: CHROMEDRIVER does not name the program that drives Chromium");
            return None;
        };
        let relay = Relay::start(outbox, receiver.address, &["--token-file", tokens.path()]).await;
        relay.serves().await;
        let (scratch, port) = (Scratch::new(), free_port().unwrap());
        let nothing: [(&str, &str); 0] = [];
        let arguments = [format!("--port={port}")];
        let driver =
            Process::spawn("chromedriver", Path::new(&program), arguments, nothing, &scratch.join("log")).unwrap();
        let page = connect(port).await;
        page.goto(&format!("http://{}/console/", relay.address)).await.unwrap();
        Some(Self { page, relay, _driver: driver, _scratch: scratch })
    }

    async fn find(&self, hook: &str) -> Element {
        let css = format!("[data-test={hook}]");
        let found = self.page.wait().at_most(AMPLE).for_element(Locator::Css(&css)).await;
        found.unwrap_or_else(|error| panic!("{hook}: {error}"))
    }

    /// The texts of what is there and visible.
    async fn texts(&self, css: &str) -> Vec<String> {
        let mut texts = Vec::new();
        for element in self.page.find_all(Locator::Css(css)).await.unwrap() {
            // The page may have redrawn it meanwhile.
            if element.is_displayed().await.unwrap_or(false) {
                texts.extend(element.text().await);
            }
        }
        texts
    }

    /// Waits until something visible contains the text.
    async fn shows(&self, css: &str, text: &str) {
        let deadline = Instant::now() + AMPLE;
        loop {
            let texts = self.texts(css).await;
            if texts.iter().any(|shown| shown.contains(text)) {
                return;
            }
            assert!(Instant::now() < deadline, "{css} does not show {text:?}, but {texts:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Clicks once it can be clicked.
    async fn click(&self, css: &str) {
        let deadline = Instant::now() + AMPLE;
        loop {
            let clicked = match self.page.find(Locator::Css(css)).await {
                Ok(element) if element.is_enabled().await.unwrap_or(false) => element.click().await,
                Ok(_) => {
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
                Err(error) => Err(error),
            };
            match clicked {
                Ok(()) => return,
                Err(error) => assert!(Instant::now() < deadline, "{css}: {error}"),
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn sign_in(&self, token: &str) {
        self.find("token-input").await.send_keys(token).await.unwrap();
        self.click("[data-test=token-submit]").await;
        self.find("waiting").await;
    }

    async fn view(&self, hash: &str) {
        self.page.execute("location.hash = arguments[0]", vec![json!(hash)]).await.unwrap();
    }

    async fn number(&self, hook: &str) -> i64 {
        let text = self.find(hook).await.text().await.unwrap();
        text.replace([',', '\u{a0}', '\u{202f}'], "").parse().unwrap_or(-1)
    }

    async fn close(self) {
        self.page.close().await.unwrap();
        self.relay.stop().await;
    }
}

/// Root cannot use Chromium's sandbox. The page is our own.
async fn connect(port: u16) -> Client {
    let mut arguments = vec!["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"];
    if rustix::process::getuid().is_root() {
        arguments.push("--no-sandbox");
    }
    let mut capabilities = Capabilities::new();
    capabilities.insert("goog:chromeOptions".into(), json!({ "args": arguments }));
    let deadline = Instant::now() + AMPLE;
    loop {
        let mut builder = ClientBuilder::new(HttpConnector::new());
        match builder.capabilities(capabilities.clone()).connect(&format!("http://127.0.0.1:{port}")).await {
            Ok(page) => return page,
            Err(error) => assert!(Instant::now() < deadline, "the browser does not start: {error}"),
        }
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn numbers_move_and_a_dead_event_that_is_requeued_there_arrives() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let tokens = Tokens::make();
    let [dead, ..] = insert_dead_with_successors(&outbox).await;
    let Some(browser) = Browser::open(&outbox, &receiver, &tokens).await else { return };
    browser.sign_in(&tokens.operator).await;
    browser.shows("[data-test=dead]", "1").await;
    browser.shows("[data-test=subscription-row]", "all").await;
    insert_many_dead(&outbox, 1234).await;
    until("the number of dead events moves", async || browser.number("dead").await == 1235).await;

    browser.view("#dead?code=UNDECODABLE").await;
    let row = format!("[data-test=dead-row][data-event='{}']", dead.event_id);
    browser.shows(&row, "UNDECODABLE: no such type").await;
    browser.click(&format!("{row} input[type=checkbox]")).await;
    browser.click("[data-test=requeue]").await;
    browser.shows("[data-test=blast]", "frees 2").await;
    browser.find("reason-input").await.send_keys("the receiver is mended").await.unwrap();
    browser.click("[data-test=confirm]").await;
    browser.shows("[data-test=outcome]", "1").await;
    outbox.wait_until_gone(dead.event_id).await;
    assert_eq!(receiver.read(Log::ids)[0], dead.event_id);
    browser.view("#deeds").await;
    browser.shows("[data-test=deed-row]", "the receiver is mended").await;
    browser.shows("[data-test=deed-row]", "Ann B.").await;
    browser.close().await;
}

#[tokio::test]
async fn a_pause_that_is_made_there_holds_and_its_undo_ends_it() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let tokens = Tokens::make();
    let Some(browser) = Browser::open(&outbox, &receiver, &tokens).await else { return };
    browser.sign_in(&tokens.operator).await;
    browser.click("[data-test=pause]").await;
    browser.find("reason-input").await.send_keys("inventory moves").await.unwrap();
    browser.click("[data-test=confirm]").await;
    browser.shows("[data-test=outcome]", "aused").await;
    browser.shows("[data-test=subscription-row]", "inventory moves").await;
    let event_id = outbox.insert_one().await;
    browser.view(&format!("#journey/{event_id}")).await;
    browser.shows("[data-test=cause]", "is paused since").await;
    browser.view("#deeds").await;
    browser.click("[data-test=deed-row] [data-test=undo]").await;
    browser.click("dialog[open] [data-test=confirm]").await;
    outbox.wait_until_gone(event_id).await;
    browser.close().await;
}

#[tokio::test]
async fn a_viewer_may_look_and_is_refused_whatever_the_page_is_made_to_send() {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let tokens = Tokens::make();
    insert_many_dead(&outbox, 3).await;
    let Some(browser) = Browser::open(&outbox, &receiver, &tokens).await else { return };
    browser.sign_in(&tokens.viewer).await;
    browser.shows("[data-test=dead]", "3").await;
    browser.view("#dead").await;
    browser.shows("[data-test=dead-row]", "BUSY").await;
    for hook in ["requeue", "discard", "requeue-all", "discard-all"] {
        assert_eq!(browser.texts(&format!("[data-test={hook}]")).await, Vec::<String>::new(), "{hook}");
    }
    let call = "const done = arguments[arguments.length - 1];
        const headers = {'content-type': 'application/json', authorization: 'Bearer ' + arguments[0]};
        const body = JSON.stringify({all: true, requeued_by: 'bob'});
        fetch('../api/RequeueDeadEvents', {method: 'POST', headers, body}).then(answer => done(answer.status));";
    let status = browser.page.execute_async(call, vec![json!(tokens.viewer)]).await.unwrap();
    assert_eq!((status, count_dead(&outbox).await), (json!(403), 3));
    let deeds = Operator::of(&outbox).reads(&["deeds", "--json"]).await;
    assert_eq!(deeds["deeds"], json!([]));
    browser.close().await;
}

/// Reasons come from receivers, whoever runs them.
#[tokio::test]
async fn a_hostile_reason_is_shown_as_text() {
    const HOSTILE: &str = "BAD: <img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script>";
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let tokens = Tokens::make();
    let event_id = outbox.insert_hidden(None, Duration::from_secs(600)).await;
    mark_dead(&outbox, event_id, HOSTILE).await;
    let Some(browser) = Browser::open(&outbox, &receiver, &tokens).await else { return };
    let listen = "window.violations = []; addEventListener('securitypolicyviolation', event => violations.push(event.violatedDirective));";
    browser.page.execute(listen, Vec::new()).await.unwrap();
    browser.sign_in(&tokens.operator).await;
    browser.view("#dead").await;
    browser.shows("[data-test=dead-row]", HOSTILE).await;
    browser.shows("[data-test=group-row]", HOSTILE).await;
    browser.view(&format!("#journey/{event_id}")).await;
    browser.shows("[data-test=journey]", HOSTILE).await;
    let harmed = browser.page.execute("return [window.hacked, violations]", Vec::new()).await.unwrap();
    assert_eq!(harmed, json!([Value::Null, []]));
    // The policy holds even if the page had a hole.
    let inject = "const script = document.createElement('script'); script.textContent = 'window.hacked = 2';
        document.body.append(script); return window.hacked";
    assert!(matches!(browser.page.execute(inject, Vec::new()).await, Err(_) | Ok(Value::Null)));
    browser.close().await;
}
