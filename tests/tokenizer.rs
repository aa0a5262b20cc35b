//! Settings saved in and beside a tokenizer: every expected id is what `AutoTokenizer` of transformers 5.24.0 (tokenizers 0.23.3)
//! gives for the same folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

use quantbench::events::{Event, Listener};
use quantbench::weights::tokenizer::{self, ChatMessage, ChatTemplate};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(model)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A copy of a golden model's files, to be changed.
struct Folder(TempDir);

impl Folder {
    fn of(model: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in fs::read_dir(golden(model)).unwrap().flatten() {
            fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        Self(folder)
    }

    /// Sets keys of a file, which comes into being where it is not there; `null` removes one.
    fn with(self, name: &str, keys: Value) -> Self {
        let path = self.0.path().join(name);
        let mut value = if path.is_file() { read(&path) } else { json!({}) };
        for (key, new) in keys.as_object().unwrap() {
            match new.is_null() {
                true => value.as_object_mut().unwrap().shift_remove(key),
                false => value.as_object_mut().unwrap().insert(key.clone(), new.clone()),
            };
        }
        fs::write(path, value.to_string()).unwrap();
        self
    }

    fn config(self, keys: Value) -> Self {
        self.with("tokenizer_config.json", keys)
    }

    /// Without one of the tokens that tokenizer.json declares.
    fn without(self, content: &str) -> Self {
        let mut tokenizer = read(&self.0.path().join("tokenizer.json"));
        tokenizer["added_tokens"].as_array_mut().unwrap().retain(|token| token["content"] != content);
        self.with("tokenizer.json", json!({"added_tokens": tokenizer["added_tokens"]}))
    }

    /// Ids of a text, and what was told.
    fn encode(&self, text: &str) -> (Vec<u32>, Vec<String>) {
        let heard = Heard::default();
        let config = read(&self.0.path().join("config.json"));
        let tokenizer = tokenizer::open(self.0.path(), &config, &heard).unwrap().unwrap();
        (tokenizer::encode(&tokenizer, text).unwrap(), heard.0.into_inner().unwrap())
    }

    fn expect(&self, text: &str, ids: &[u32]) {
        let (seen, told) = self.encode(text);
        assert_eq!(seen, ids, "{text}");
        assert!(told.is_empty(), "{told:?}");
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Listener for Heard {
    fn on(&self, event: Event) {
        if let Event::Warning { name, message } = event {
            assert_eq!(name, "unapplied_tokenizer_setting");
            self.0.lock().unwrap().push(message);
        }
    }
}

fn token(content: &str, more: Value) -> Value {
    let mut token = json!({"content": content, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false, "special": true});
    token.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    token
}

fn plain(content: &str) -> Value {
    token(content, json!({}))
}

const HELLO: &[u32] = &[506, 256, 269, 78, 265, 380, 75, 67];

fn padding(strategy: Value, multiple: Value) -> Value {
    json!({"strategy": strategy, "direction": "Left", "pad_to_multiple_of": multiple, "pad_id": 507, "pad_type_id": 0, "pad_token": "<|end_of_text|>"})
}

fn truncation(direction: &str) -> Value {
    json!({"direction": direction, "max_length": 4, "strategy": "LongestFirst", "stride": 0})
}

#[test]
fn a_prompt_is_neither_filled_up_nor_cut() {
    let fixed = padding(json!({"Fixed": 32}), Value::Null);
    for saved in [
        json!({}),
        json!({"padding": fixed}),
        json!({"padding": padding(json!("BatchLongest"), json!(16))}),
        json!({"truncation": truncation("Right")}),
        json!({"truncation": truncation("Left")}),
        json!({"truncation": truncation("Left"), "padding": fixed}),
    ] {
        Folder::of("llama-tiny").with("tokenizer.json", saved).expect("hello world", HELLO);
    }
}

#[test]
fn tokens_beside_the_tokenizer_are_added_with_their_flags() {
    let llama = || Folder::of("llama-tiny");
    let decoder = |tokens: Value| json!({"added_tokens_decoder": tokens});
    llama()
        .without("<|eot_id|>")
        .config(decoder(json!({"508": plain("<|eot_id|>")})))
        .expect("hi<|eot_id|>", &[506, 71, 72, 508]);
    let two = json!({"510": plain("<call>"), "509": token("<tool>", json!({"special": false}))});
    llama().config(decoder(two)).expect("a<tool>b<call>c", &[506, 64, 509, 65, 510, 66]);
    let strips = json!({"509": token("<tool>", json!({"lstrip": true, "rstrip": true}))});
    llama().config(decoder(strips)).expect("hi  <tool>  x", &[506, 71, 72, 509, 87]);
    let word = json!({"509": token("tool", json!({"single_word": true}))});
    let ids = [506, 71, 72, 220, 87, 83, 78, 78, 75, 220, 509, 220, 87];
    llama().config(decoder(word)).expect("hi xtool tool x", &ids);
    llama().config(decoder(json!({"509": {"content": "<tool>"}}))).expect("hi <tool>", &[506, 71, 72, 220, 509]);
    // Flags of a token that tokenizer.json has too.
    let again = json!({"508": token("<|eot_id|>", json!({"lstrip": true}))});
    llama().config(decoder(again)).expect("hi  <|eot_id|>  x", &[506, 71, 72, 508, 220, 220, 87]);
    // One that is a word of the vocabulary keeps its id.
    llama().config(decoder(json!({"256": token("he", json!({"special": false}))}))).expect("hello world", HELLO);
    let phi = json!({"492": plain("<|endoftext|>"), "493": token("<a>", json!({"special": false}))});
    Folder::of("phi-tiny").config(decoder(phi)).expect("hi<a><|endoftext|>", &[71, 72, 493, 492]);
}

#[test]
fn the_older_files_count_where_the_newer_one_is_silent() {
    let llama = || Folder::of("llama-tiny").with("added_tokens.json", json!({"<tool>": 509}));
    llama().expect("hi<tool>x", &[506, 71, 72, 509, 87]);
    let special = json!({"additional_special_tokens": ["<tool>"]});
    llama().with("special_tokens_map.json", special).expect("hi<tool>x", &[506, 71, 72, 509, 87]);
    let newer = json!({"added_tokens_decoder": {"508": plain("<|eot_id|>")}});
    llama().config(newer).expect("hi<tool>x", &[506, 71, 72, 27, 83, 78, 78, 75, 29, 87]);
    let pad = json!({"content": "[PAD]", "lstrip": false, "rstrip": true, "normalized": false, "single_word": false});
    let map = json!({"additional_special_tokens": ["<a>", "<b>"], "pad_token": pad});
    let ids = [506, 71, 72, 220, 220, 510, 220, 220, 511, 220, 220, 509, 87];
    Folder::of("llama-tiny").with("special_tokens_map.json", map).expect("hi  <a>  <b>  [PAD]  x", &ids);
}

#[test]
fn special_tokens_are_added_by_name_and_in_order() {
    let llama = |keys: Value| Folder::of("llama-tiny").config(keys);
    let two = &[506, 71, 72, 509, 220, 510];
    llama(json!({"additional_special_tokens": ["<a>", "<b>"]})).expect("hi<a> <b>", two);
    llama(json!({"extra_special_tokens": ["<a>", "<b>"]})).expect("hi<a> <b>", two);
    llama(json!({"extra_special_tokens": {"image_token": "<a>", "boi_token": "<b>"}})).expect("hi<a> <b>", two);
    llama(json!({"pad_token": "[PAD]", "image_token": "<img>"})).expect("hi[PAD]<img>x", &[506, 71, 72, 509, 510, 87]);
    let pad = json!({"__type": "AddedToken", "content": "[PAD]", "lstrip": true, "rstrip": false, "normalized": false, "single_word": false});
    llama(json!({"pad_token": pad})).expect("hi  [PAD]  x", &[506, 71, 72, 509, 220, 220, 87]);
    let both = json!({"added_tokens_decoder": {"509": plain("<b>")}, "additional_special_tokens": ["<a>"]});
    llama(both).expect("hi<a><b>", &[506, 71, 72, 510, 509]);
}

#[test]
fn settings_of_the_text_itself_count_as_in_transformers() {
    let llama = |keys: Value| Folder::of("llama-tiny").config(keys);
    let split = [506, 71, 72, 27, 91, 68, 78, 83, 62, 72, 67, 91, 29];
    llama(json!({"split_special_tokens": true})).expect("hi<|eot_id|>", &split);
    // Left aside beside a tokenizer.json.
    llama(json!({"add_bos_token": false, "add_eos_token": true})).expect("hello world", HELLO);
    llama(json!({"add_prefix_space": true})).expect("hello world", HELLO);

    let phi = |keys: Value| Folder::of("phi-tiny").config(keys);
    let (spaced, close) = ([220, 256, 269, 78, 265, 380, 75, 67], &HELLO[1..]);
    phi(json!({})).expect("hello world", close);
    phi(json!({"add_prefix_space": true})).expect("hello world", &spaced);
    phi(json!({"add_prefix_space": true, "tokenizer_class": "GPT2TokenizerFast"})).expect("hello world", &spaced);
    let mut saved = read(&golden("phi-tiny").join("tokenizer.json"))["pre_tokenizer"].clone();
    saved["add_prefix_space"] = true.into();
    let saved = json!({"pre_tokenizer": saved});
    let unnamed = json!({"tokenizer_class": null, "add_prefix_space": null});
    phi(unnamed).with("tokenizer.json", saved.clone()).expect("hello world", close);
    let as_saved = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
    phi(as_saved.clone()).with("tokenizer.json", saved).expect("hello world", &spaced);

    let t5 = |keys: Value| Folder::of("t5-tiny").config(keys);
    t5(json!({})).expect("a ﬁ é", &[46, 3, 2, 3, 2, 1]);
    t5(as_saved.clone()).expect("a ﬁ é", &[46, 3, 23, 18, 3, 2, 1]);

    let gemma = |keys: Value| Folder::of("paligemma-tiny").config(keys);
    let (text, close) = ("caption<eos>caption en", [2, 412, 1, 412, 336]);
    let (first, always) = ([2, 384, 346, 324, 1, 412, 336], [2, 384, 346, 324, 1, 384, 346, 324, 336]);
    gemma(json!({})).expect(text, &close);
    gemma(as_saved).expect(text, &close);
    let class = |more: Value| {
        let mut keys = json!({"tokenizer_class": "LlamaTokenizer"});
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        gemma(keys)
    };
    class(json!({})).expect(text, &first);
    class(json!({"legacy": true})).expect(text, &always);
    class(json!({"add_prefix_space": false})).expect(text, &close);
}

#[test]
fn what_is_not_applied_is_told() {
    let told = |keys: Value| Folder::of("llama-tiny").config(keys).encode("hello world").1;
    assert_eq!(
        told(json!({"do_lower_case": true})),
        ["`do_lower_case` of tokenizer_config.json is `true`, which is not applied"]
    );
    assert!(told(json!({"do_lower_case": false, "sp_model_kwargs": {}, "chat_template": "{{ x }}"})).is_empty());
    assert!(told(json!({"tokenizer_class": "QwenTokenizer"}))[0].contains("`QwenTokenizer`"));
    let folder = Folder::of("llama-tiny").config(json!({"added_tokens_decoder": {"600": plain("<tool>")}}));
    let (ids, told) = folder.encode("hi<tool>");
    assert_eq!(ids, [506, 71, 72, 509]);
    assert!(told[0].contains("declared with id 600 and has id 509"), "{told:?}");
}

#[test]
fn tokens_that_are_none_are_bad_input() {
    for keys in [
        json!({"added_tokens_decoder": {"first": plain("<tool>")}}),
        json!({"added_tokens_decoder": {"509": {"lstrip": true}}}),
        json!({"pad_token": 7}),
        json!({"additional_special_tokens": ["<a>", 7]}),
    ] {
        let folder = Folder::of("llama-tiny").config(keys.clone());
        let config = read(&folder.0.path().join("config.json"));
        let error = tokenizer::open(folder.0.path(), &config, &Heard::default()).expect_err("no token");
        assert!(error.to_string().contains("is not a tokenizer that can be used"), "{keys}: {error}");
        assert!(quantbench::error::hint(&error).is_some());
    }
}

/// A message, and what the expected text is made of: tests/golden/chat/make.py.
#[derive(serde::Deserialize)]
struct Chat {
    template: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    messages: Vec<Value>,
    /// `None` where the template refuses the messages.
    text: Option<String>,
}

#[test]
fn chat_templates_write_what_transformers_writes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat");
    let chats: Vec<Chat> = serde_json::from_value(read(&folder.join("expected.json"))).unwrap();
    assert_eq!(chats.len(), 25);
    for chat in &chats {
        let source = fs::read_to_string(folder.join(format!("{}.jinja", chat.template))).unwrap();
        let tokens = json!({"bos_token": chat.bos_token, "eos_token": chat.eos_token});
        let part = |message: &'_ Value, key: &str| message[key].as_str().unwrap().to_owned();
        let messages: Vec<_> = chat.messages.iter().map(|m| (part(m, "role"), part(m, "content"))).collect();
        let messages: Vec<_> = messages.iter().map(|(role, content)| ChatMessage { role, content }).collect();
        let seen = ChatTemplate::new(source, tokens.as_object().unwrap()).render(&messages);
        assert_eq!(seen.as_ref().ok(), chat.text.as_ref(), "{}: {messages:?} {:?}", chat.template, seen.as_ref().err());
    }
}

const ENDS_WITH_A_TURN: &str = "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}<|eot_id|>{% endfor %}";

/// The ids of `apply_chat_template(…, tokenize=True)`: one token of the beginning, not two.
#[test]
fn a_chat_becomes_the_ids_of_transformers() {
    let setting = Folder::of("llama-tiny").config(json!({"chat_template": ENDS_WITH_A_TURN}));
    let named = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": ENDS_WITH_A_TURN}]);
    let named = Folder::of("llama-tiny").config(json!({"chat_template": named}));
    let file = Folder::of("llama-tiny").config(json!({"chat_template": "{{ nothing }}"}));
    fs::write(file.0.path().join("chat_template.jinja"), ENDS_WITH_A_TURN).unwrap();
    for folder in [setting, named, file] {
        let seen = record(&run(&folder, &[&["--chat", "--prompt", " hello world "][..], &SHORT].concat()));
        // [506, 256, 269, 78, 265, 380, 75, 67, 508]
        assert_eq!(seen["workload"]["n_prompt"], 9);
        let exact = "506,256,269,78,265,380,75,67,508";
        let plain = record(&run(&folder, &[&["--prompt-ids", exact][..], &SHORT].concat()));
        assert_eq!(seen["output"]["token_ids"], plain["output"]["token_ids"]);
    }
}

#[test]
fn a_chat_needs_a_template_and_a_plain_prompt_is_told_of_one() {
    let stderr = |folder: &Folder, words: &[&str]| {
        let output = run(folder, &[words, &SHORT[..]].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = stderr(&Folder::of("llama-tiny"), &["--chat"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("has no chat template") && said.contains("hint: drop `--chat`"), "{said}");
    let with = Folder::of("llama-tiny").config(json!({"chat_template": ENDS_WITH_A_TURN}));
    assert!(stderr(&with, &["--prompt", "hi"]).1.contains("hint: the model has a chat template"));
    for words in [&["--prompt", "hi", "--chat"][..], &["--prompt", "hi", "--quiet"], &["--prompt-tokens", "3"], &[]] {
        assert!(!stderr(&with, words).1.contains("hint:"), "{words:?}");
    }
    let refuses = Folder::of("llama-tiny").config(json!({"chat_template": "{{ raise_exception('no') }}"}));
    let (code, said) = stderr(&refuses, &["--chat"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("the model's chat template cannot be applied: ") && said.contains("no"), "{said}");
}

fn run(folder: &Folder, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.args(args).arg("--model-id").arg(folder.0.path()).args(["--device", "cpu", "--threads", "1"]);
    command.args(["--precision", "fp16", "--format", "json"]).stdin(Stdio::null()).output().unwrap()
}

fn record(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["records"][0].clone()
}

const SHORT: [&str; 6] = ["--warmup", "0", "--repeats", "1", "--max-new-tokens", "1"];

#[test]
fn a_run_reads_the_whole_prompt_and_quality_the_whole_text() {
    let folder = Folder::of("llama-tiny").with("tokenizer.json", json!({"truncation": truncation("Right")}));
    let seen = record(&run(&folder, &[&["--prompt", "hello world"][..], &SHORT].concat()));
    assert_eq!(seen["workload"]["n_prompt"], 8);
    let seen = record(&run(&folder, &["quality", "--quality-tokens", "40"]));
    assert_eq!(seen["quality"]["n_tokens"], 39);
}

#[test]
fn tokens_beyond_the_model_are_refused() {
    // The model has 512 rows.
    let tokens: Value =
        (509..513).map(|id| (id.to_string(), plain(&format!("<x{id}>")))).collect::<serde_json::Map<_, _>>().into();
    let folder = Folder::of("llama-tiny").config(json!({"added_tokens_decoder": tokens}));
    let vocab = read(&folder.0.path().join("config.json"))["vocab_size"].as_u64().unwrap();
    let prompt = format!("hi<x{vocab}>");
    let output = run(&folder, &[&["--prompt", &prompt][..], &SHORT].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(
        errors.contains(&format!("prompt id {vocab} is outside")) && errors.contains("hint: take tokenizer"),
        "{errors}"
    );
}
