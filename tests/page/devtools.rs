//! A real browser over its DevTools protocol, which Chromium speaks as JSON between zero bytes on file descriptors 3 and 4.

use std::collections::VecDeque;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// The browsers that this knows how to ask, by the names that distributions give them.
pub const BROWSERS: &[&str] = &[
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome-headless-shell",
];

/// The browser hangs if it says nothing for so long; a loaded machine takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// The program of a browser that is installed.
pub fn find() -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    let folders: Vec<PathBuf> = env::split_paths(&folders).collect();
    BROWSERS.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|path| path.is_file())
}

/// A browser with one page.
pub struct Browser {
    process: Child,
    requests: ChildStdin,
    messages: Receiver<Value>,
    /// Events that came while an answer was waited for, oldest first.
    events: VecDeque<Value>,
    last_id: u64,
    session: String,
    /// Errors and warnings of the console since they were last asked for.
    console: Vec<String>,
    /// Its profile, and where it saves to.
    folder: TempDir,
}

impl Browser {
    pub fn start(program: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = Command::new("sh");
        // The pipes become 3 and 4: the standard library can set 0 to 2 alone.
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh"]).arg(program);
        command.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            "--no-first-run",
        ]);
        command.arg(format!("--user-data-dir={}", folder.path().join("profile").display())).arg("about:blank");
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start the browser");
        let requests = process.stdin.take().expect("a pipe");
        let mut answers = BufReader::new(process.stdout.take().expect("a pipe"));
        let (send, messages) = channel();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            while answers.read_until(0, &mut bytes).is_ok_and(|n| n > 0) {
                let message = serde_json::from_slice(bytes.strip_suffix(&[0]).unwrap_or(&bytes)).expect("JSON");
                if send.send(message).is_err() {
                    break;
                }
                bytes.clear();
            }
        });
        let (events, session, console) = (VecDeque::new(), String::new(), Vec::new());
        let mut browser = Self { process, requests, messages, events, last_id: 0, session, console, folder };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let session = browser.call("Target.attachToTarget", json!({"targetId": target, "flatten": true}));
        browser.session = session["sessionId"].as_str().expect("a session").to_owned();
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            browser.call(domain, json!({}));
        }
        browser
    }

    /// Sends a command and gives its result.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last_id += 1;
        let mut request = json!({"id": self.last_id, "method": method, "params": parameters});
        // What concerns the browser as a whole goes to no page.
        if !self.session.is_empty() && !method.starts_with("Browser.") {
            request["sessionId"] = self.session.as_str().into();
        }
        self.requests.write_all(format!("{request}\0").as_bytes()).expect("write to the browser");
        let id = self.last_id;
        let answer = loop {
            let message = self.receive(&format!("answer to {method}"));
            if message["id"] == id {
                break message;
            }
            self.events.push_back(message);
        };
        assert!(answer.get("error").is_none(), "{method}: {}", answer["error"]);
        answer["result"].clone()
    }

    /// The next event that `is_meant`, which may have come before the answer to the command that caused it.
    fn event(&mut self, what: &str, is_meant: impl Fn(&Value) -> bool) -> Value {
        loop {
            let event = self.events.pop_front().unwrap_or_else(|| self.receive(what));
            if is_meant(&event) {
                return event;
            }
        }
    }

    /// The next message; what it says of the console is kept.
    fn receive(&mut self, what: &str) -> Value {
        let message = self.messages.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("no {what}: {error}"));
        self.console.extend(complaint(&message));
        message
    }

    /// Opens a file in a window of this width and waits until it is loaded.
    pub fn open(&mut self, file: &Path, width: u32, is_dark: bool) {
        let metrics = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if is_dark { "dark" } else { "light" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", features);
        self.events.clear();
        self.call("Page.navigate", json!({"url": format!("file://{}", file.display())}));
        self.event("load of the page", |event| event["method"] == "Page.loadEventFired");
    }

    /// The value of a JavaScript expression.
    pub fn value(&mut self, expression: &str) -> Value {
        let result = self.call("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }

    /// Middle of the first element that `selector` finds, scrolled into view, in pixels of the window.
    fn middle(&mut self, selector: &str) -> (f64, f64) {
        let found = self.value(&format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{block: 'center'}}); \
             const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        ));
        (found[0].as_f64().expect(selector), found[1].as_f64().expect(selector))
    }

    fn mouse(&mut self, kind: &str, (x, y): (f64, f64)) {
        let is_press = kind != "mouseMoved";
        let button = if is_press { "left" } else { "none" };
        let event = json!({"type": kind, "x": x, "y": y, "button": button, "clickCount": u8::from(is_press)});
        self.call("Input.dispatchMouseEvent", event);
    }

    /// Moves the pointer over the element.
    pub fn hover(&mut self, selector: &str) {
        let at = self.middle(selector);
        self.mouse("mouseMoved", at);
    }

    pub fn click(&mut self, selector: &str) {
        let at = self.middle(selector);
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            self.mouse(kind, at);
        }
    }

    /// Types into the element.
    pub fn type_into(&mut self, selector: &str, text: &str) {
        self.click(selector);
        self.value(&format!("document.querySelector({selector:?}).select()"));
        match text {
            "" => {
                for kind in ["keyDown", "keyUp"] {
                    self.call(
                        "Input.dispatchKeyEvent",
                        json!({"type": kind, "key": "Delete", "windowsVirtualKeyCode": 46}),
                    );
                }
            }
            text => {
                self.call("Input.insertText", json!({"text": text}));
            }
        }
    }

    /// The text of the file that a click on the element saves.
    pub fn saved(&mut self, selector: &str) -> String {
        let folder = self.folder.path().join("saved");
        std::fs::create_dir_all(&folder).expect("a folder");
        let behavior = json!({"behavior": "allowAndName", "downloadPath": folder, "eventsEnabled": true});
        self.call("Browser.setDownloadBehavior", behavior);
        self.events.clear();
        self.click(selector);
        let is_ended =
            |event: &Value| event["method"] == "Browser.downloadProgress" && event["params"]["state"] != "inProgress";
        let done = self.event("file", is_ended);
        assert_eq!(done["params"]["state"], "completed", "{done}");
        let name = done["params"]["guid"].as_str().expect("a name");
        std::fs::read_to_string(folder.join(name)).expect("the saved file")
    }

    /// A PNG of the whole page.
    pub fn picture(&mut self) -> Vec<u8> {
        let height = self.value("document.documentElement.scrollHeight");
        let width = self.value("document.documentElement.clientWidth");
        let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
        let picture = self.call("Page.captureScreenshot", json!({"clip": clip, "captureBeyondViewport": true}));
        from_base64(picture["data"].as_str().expect("a picture"))
    }

    /// Errors and warnings that the console has said since the last time.
    pub fn console(&mut self) -> Vec<String> {
        // Whatever came before the answer has been read by then.
        self.value("0");
        std::mem::take(&mut self.console)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.requests.write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        let _ = self.process.wait();
    }
}

/// What a message tells of an error.
fn complaint(message: &Value) -> Option<String> {
    let parameters = &message["params"];
    let level = match message["method"].as_str()? {
        "Runtime.exceptionThrown" => return Some(parameters["exceptionDetails"].to_string()),
        "Runtime.consoleAPICalled" => &parameters["type"],
        "Log.entryAdded" => &parameters["entry"]["level"],
        _ => return None,
    };
    matches!(level.as_str(), Some("error" | "warning")).then(|| parameters.to_string())
}

fn from_base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u32> = text.bytes().filter_map(digit).map(u32::from).collect();
    let bytes = digits.chunks(4).flat_map(|four| {
        let bits = four.iter().enumerate().fold(0, |bits, (at, digit)| bits | digit << (18 - 6 * at));
        bits.to_be_bytes()[1..four.len()].to_vec()
    });
    bytes.collect()
}

#[test]
fn base64_is_decoded() {
    assert_eq!(from_base64("TWFueSBoYW5kcw=="), b"Many hands");
    assert_eq!(from_base64("+/8="), [0xfb, 0xff]);
}
