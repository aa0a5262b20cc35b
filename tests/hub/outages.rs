//! Hubs that are busy, slow, changed on the way, or somewhere else than they say; several who want the same file.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use quantbench::error;
use quantbench::events::{Event, Silent};
use quantbench::weights::hub::{HubConfig, Patience, Timeouts};
use quantbench::weights::{self, WeightsChoice};

use super::server::{Behaviour, Hub, refused_endpoint, silent_endpoint};
use super::{COMMIT, Heard, ID, Pauses, SECRET, config, files, impatient, matrix, open, request, safetensors};

/// With the usual number of attempts.
fn patient(config: HubConfig, pauses: &Pauses) -> HubConfig {
    HubConfig { patience: impatient(pauses), ..config }
}

fn seconds(pauses: &[u64]) -> Vec<Duration> {
    pauses.iter().map(|pause| Duration::from_secs(*pause)).collect()
}

fn warnings(heard: Heard) -> Vec<(String, String)> {
    let events = heard.0.into_inner().unwrap().into_iter();
    events
        .filter_map(|event| if let Event::Warning { name, message } = event { Some((name, message)) } else { None })
        .collect()
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    for is_hashed in [true, false] {
        let store = Hub::serve(Behaviour { files: files(), is_store: true, is_hashed, ..Default::default() });
        let far = Some(store.endpoint.clone());
        let hub = Hub::serve(Behaviour { files: files(), store: far, is_hashed, ..Default::default() });
        let home = tempfile::tempdir().unwrap();
        let opened = open(&config(&hub.endpoint, home.path(), Some(SECRET)), &Silent).unwrap();
        opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
        let (own, other) = (hub.log_with_tokens(), store.log_with_tokens());
        // Its own relative redirects too.
        assert!(
            own.iter().any(|(line, _)| line.contains("/relative/")) && own.iter().all(|(_, token)| *token),
            "{own:?}"
        );
        assert!(other.iter().any(|(line, _)| line.starts_with("GET")), "{other:?}");
        assert!(other.iter().all(|(_, token)| !token), "{other:?}");
    }
}

#[test]
fn a_circle_of_redirects_ends() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    hub.answer_all("302", "Location: /again\r\n", "");
    let home = tempfile::tempdir().unwrap();
    let error = open(&config(&hub.endpoint, home.path(), None), &Silent).err().unwrap();
    assert!(error.to_string().contains("redirects more than"), "{error}");
    assert!(hub.log().len() < 20);
}

#[test]
fn a_hub_that_is_busy_for_a_moment_is_waited_for() {
    for (status, headers, pause) in [
        ("429", "Retry-After: 7\r\n", 7),
        ("503", "", 1),
        ("500", "", 1),
        ("502", "", 1),
        ("504", "Retry-After: 0\r\n", 0),
    ] {
        let hub = Hub::serve(Behaviour { files: files(), first: Some((status, headers)), ..Default::default() });
        let (home, pauses) = (tempfile::tempdir().unwrap(), Pauses::default());
        let config = patient(config(&hub.endpoint, home.path(), None), &pauses);
        let opened = open(&config, &Silent).unwrap_or_else(|error| panic!("{status}: {error:#}"));
        opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
        let pauses = pauses.taken();
        // As often as a path was asked for first; pauses grow within one request alone.
        assert!(pauses.len() > 5 && pauses[0] == Duration::from_secs(pause), "{status}: {pauses:?}");
    }
}

#[test]
fn patience_ends() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    hub.answer_all("503", "", "");
    let (home, pauses) = (tempfile::tempdir().unwrap(), Pauses::default());
    let config = patient(config(&hub.endpoint, home.path(), None), &pauses);
    let heard = Heard::default();
    let error = open(&config, &heard).err().unwrap();
    assert!(error.to_string().contains("answered 503"), "{error}");
    assert_eq!(pauses.taken(), seconds(&[1, 2, 4, 8, 8]));
    let heard = heard.0.into_inner().unwrap();
    let told =
        |event: &Event| matches!(event, Event::Begin { label, .. } if label.contains("503") && label.contains("4 s"));
    assert!(heard.iter().any(told) && heard.last() == Some(&Event::End), "{heard:?}");

    hub.answer_all("429", "Retry-After: 86400\r\n", "");
    let error = open(&config, &Silent).err().unwrap();
    assert!(error.to_string().contains("asks to wait 86400 s"), "{error}");
    assert!(pauses.taken().is_empty(), "a day is too long");
}

#[test]
fn an_outage_leaves_the_cached_commit() {
    let whole = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    open(&config(&whole.endpoint, home.path(), None), &Silent).unwrap();
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let pauses = Pauses::default();
    let config = patient(config(&hub.endpoint, home.path(), Some(SECRET)), &pauses);
    for (status, headers, body, name, part) in [
        ("429", "Retry-After: 9\r\n", "slow down", "hub_busy", "429"),
        ("500", "", "", "hub_busy", "500"),
        ("200", "Content-Type: text/html\r\n", "<html>please sign in</html>", "hub_unreachable", "web page"),
    ] {
        hub.answer_all(status, headers, body);
        let survey = weights::survey_with(&request(ID, WeightsChoice::Auto), &config, &Silent).unwrap();
        assert!(survey.files.iter().all(|file| file.is_cached));
        let heard = Heard::default();
        assert_eq!(open(&config, &heard).unwrap().revision.as_deref(), Some(COMMIT));
        let warnings = warnings(heard);
        let [(seen, message)] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(seen == name && message.contains(part) && message.contains(COMMIT), "{seen}: {message}");
        // A record may be shown to anyone.
        assert!(!message.contains("127.0.0.1") && !message.contains(SECRET), "{message}");
    }
    assert!(pauses.taken().is_empty(), "a cache that is whole waits for nobody");
    // What the hub says about the user is not an outage.
    hub.answer_all("401", "X-Error-Code: GatedRepo\r\n", "");
    assert!(open(&config, &Silent).is_err());
}

#[test]
fn an_outage_in_the_middle_leaves_the_cached_commit_too() {
    let home = tempfile::tempdir().unwrap();
    let whole = Hub::serve(Behaviour { files: files(), ..Default::default() });
    open(&config(&whole.endpoint, home.path(), None), &Silent).unwrap();
    // As a cache that an older program filled, which noted nothing about absent files.
    fs::remove_dir_all(home.path().join("hub/models--owner--model/.no_exist")).unwrap();
    let hub = Hub::serve(Behaviour { files: files(), first: Some(("503", "")), ..Default::default() });
    let mut config = config(&hub.endpoint, home.path(), None);
    config.patience.retries = 0;
    let heard = Heard::default();
    open(&config, &heard).unwrap();
    assert_eq!(warnings(heard)[0].0, "hub_busy");
}

#[test]
fn a_page_for_signing_in_is_no_model() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    hub.answer_all("200", "Content-Type: text/html\r\n", "<html>please sign in</html>");
    let home = tempfile::tempdir().unwrap();
    let error = open(&config(&hub.endpoint, home.path(), None), &Silent).err().unwrap();
    assert!(error.to_string().contains("no model hub: a web page came"), "{error}");
}

#[test]
fn content_that_is_not_what_was_announced_is_refused() {
    let short = safetensors("a.weight", 10);
    let mut changed = files()["model.safetensors"].clone();
    *changed.last_mut().unwrap() ^= 1;
    for (swapped, part) in [(short, "bytes are sent"), (changed, "its SHA-256 is")] {
        let swapped = [("model.safetensors", swapped)].into();
        let hub = Hub::serve(Behaviour { files: files(), is_hashed: true, swapped, ..Default::default() });
        let home = tempfile::tempdir().unwrap();
        let error = open(&config(&hub.endpoint, home.path(), None), &Silent).err().expect(part);
        assert!(error.to_string().contains(part), "{error}");
        let blobs: Vec<_> =
            fs::read_dir(home.path().join("hub/models--owner--model/blobs")).unwrap().flatten().collect();
        let kept = blobs.iter().any(|blob| blob.metadata().unwrap().len() > 1000);
        assert!(!kept, "{part}: wrong content stays in the cache");
    }
}

#[test]
fn a_part_of_other_content_is_thrown_away() {
    let hub = Hub::serve(Behaviour { files: files(), is_hashed: true, ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    open(&config, &Silent).unwrap();
    let repository = home.path().join("hub/models--owner--model");
    let link = repository.join("snapshots").join(COMMIT).join("model.safetensors");
    let blob = repository.join("snapshots").join(COMMIT).join(fs::read_link(&link).unwrap());
    let whole = fs::read(&blob).unwrap();
    for n in [5, whole.len()] {
        fs::remove_file(&link).unwrap();
        fs::remove_file(&blob).unwrap();
        fs::write(blob.with_extension("incomplete"), vec![7; n]).unwrap();
        open(&config, &Silent).unwrap_or_else(|error| panic!("{n}: {error:#}"));
        assert_eq!(fs::read(&blob).unwrap(), whole, "{n}");
    }
    // A blob that is too short is not taken for the file.
    fs::remove_file(&link).unwrap();
    fs::write(&blob, &whole[..9]).unwrap();
    open(&config, &Silent).unwrap();
    assert_eq!(fs::read(&blob).unwrap(), whole);
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let hub = Hub::serve(Behaviour { files: files(), break_after: AtomicUsize::new(1500), ..Default::default() });
    let (home, pauses) = (tempfile::tempdir().unwrap(), Pauses::default());
    let config = patient(config(&hub.endpoint, home.path(), None), &pauses);
    let heard = Heard::default();
    open(&config, &heard).unwrap().source(&[matrix("a.weight", 1000)], &[]).unwrap();
    assert!(hub.log().iter().any(|line| line == "GET /blobs/model.safetensors bytes=1500-"));
    assert_eq!(pauses.taken(), seconds(&[1]));
    let heard = heard.0.into_inner().unwrap();
    assert!(heard.contains(&Event::Progress { done: 1500 }), "{heard:?}");
}

#[test]
fn a_host_that_says_nothing_is_given_up() {
    let (endpoint, _listener) = silent_endpoint();
    let home = tempfile::tempdir().unwrap();
    let short = Duration::from_millis(50);
    let config =
        HubConfig { timeouts: Timeouts { answer: short, idle: short }, ..config(&endpoint, home.path(), None) };
    let error = open(&config, &Silent).err().unwrap();
    assert!(error.to_string().contains("cannot be reached: timeout"), "{error}");
}

#[test]
fn nobody_there_is_told_at_once() {
    let (home, pauses) = (tempfile::tempdir().unwrap(), Pauses::default());
    let config = patient(config(&refused_endpoint(), home.path(), None), &pauses);
    assert!(open(&config, &Silent).is_err());
    assert!(pauses.taken().is_empty());
}

#[test]
fn the_second_of_two_waits_for_the_first() {
    let behaviour = Behaviour { files: files(), waits_for_askers: 2, is_hashed: true, ..Default::default() };
    let hub = Hub::serve(behaviour);
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| open(&config, &Silent).unwrap().source(&[matrix("a.weight", 1000)], &[]).unwrap());
        }
    });
    let log = hub.log();
    let n = log.iter().filter(|line| line.starts_with("GET /blobs/model.safetensors")).count();
    assert_eq!(n, 1, "{log:?}");
}

#[test]
fn waiting_for_another_process_is_told() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let locks = home.path().join("hub/.locks/models--owner--model");
    fs::create_dir_all(&locks).unwrap();
    let lock = fs::File::create(locks.join("etag-model-safetensors.lock")).unwrap();
    lock.lock().unwrap();
    // The other one ends at the third look.
    let held = Mutex::new((Some(lock), 0));
    let sleep = move |_| {
        let mut held = held.lock().unwrap();
        held.1 += 1;
        if held.1 == 3 {
            held.0 = None;
        }
    };
    let mut config = config(&hub.endpoint, home.path(), None);
    config.patience = Patience { sleep: std::sync::Arc::new(sleep), ..Patience::default() };
    let heard = Heard::default();
    open(&config, &heard).unwrap();
    let heard = heard.0.into_inner().unwrap();
    let told =
        |event: &Event| matches!(event, Event::Begin { label, .. } if label.starts_with("wait for another process"));
    assert_eq!(heard.iter().filter(|event| told(event)).count(), 1, "{heard:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_named() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let blobs = home.path().join("hub/models--owner--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    std::os::unix::fs::symlink("/dev/full", blobs.join("etag-model-safetensors.incomplete")).unwrap();
    let error = open(&config(&hub.endpoint, home.path(), None), &Silent).err().expect("nothing fits there");
    assert!(
        error.to_string().contains("cannot be kept in the cache") && error.to_string().contains("No space"),
        "{error}"
    );
    assert!(error::hint(&error).unwrap().contains("`HF_HUB_CACHE`"));
}

#[test]
fn what_is_absent_is_asked_for_once_and_a_commit_not_at_all() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    open(&config, &Silent).unwrap();
    assert!(hub.log().iter().any(|line| line.contains("tokenizer.json")));
    open(&config, &Silent).unwrap();
    assert!(hub.log().iter().all(|line| line.contains("/config.json")), "only the branch is looked up");
    let pinned = weights::ModelRequest { revision: Some(COMMIT.to_owned()), ..request(ID, WeightsChoice::Auto) };
    weights::open_with(&pinned, &config, &Silent).unwrap();
    assert!(hub.log().is_empty(), "a commit never changes");
}
