//! Commands as records show them: enough to repeat a run, nothing that says whose machine it was.

use std::path::Path;

/// Flags whose value is text, where a slash is no path.
const TEXT_FLAGS: &[&str] = &["--prompt"];

/// Flags whose value may be a hub id, `owner/name`.
const MODEL_FLAGS: &[&str] = &["--model-id", "--model", "-m"];

/// Flags whose value is a file that must be there: without its folder it is a placeholder.
const INPUT_FLAGS: &[&str] = &["--prompt-file", "--image", "--quality-text", "--baseline", "--ab"];

/// Placeholder for the folders of a path, which are not shown.
const PLACEHOLDER: &str = "PATH/TO/";

/// How tokens of the hub begin.
const TOKEN_PREFIX: &str = "hf_";

/// Shortest run of letters and digits after [`TOKEN_PREFIX`] that is taken for a token; `hf_bnb` is a name.
const TOKEN_LETTERS: usize = 16;

/// Folders that hold users' homes, on Linux, macOS and Windows.
const HOMES: &[&str] = &["/home/", "/Users/", "\\Users\\", "/root/"];

/// The command line of `args` (the program first), quoted for a shell. Of paths the last component stays, behind a placeholder where
/// whoever repeats the command needs the file itself; hub ids stay, and prompts but for paths into a home; a hub token becomes
/// `hf_***`.
pub fn shareable_command(args: impl Iterator<Item = String>) -> String {
    let mut flag = String::new();
    let mut words = Vec::new();
    for arg in args {
        words.push(quote(&hide_tokens(&shareable_word(&flag, &arg))));
        flag = arg;
    }
    words.join(" ")
}

/// `arg` with its paths cut, where `flag` is the argument before it.
fn shareable_word(flag: &str, arg: &str) -> String {
    if TEXT_FLAGS.contains(&flag) {
        // It may begin with a dash.
        return shareable_value(flag, arg);
    }
    if let Some((flag, value)) = arg.split_once('=').filter(|_| arg.starts_with("--")) {
        return format!("{flag}={}", shareable_value(flag, value));
    }
    // `-ovalue`: a short flag may carry its value.
    match arg.char_indices().nth(2) {
        Some((value, _)) if arg.starts_with('-') && !arg.starts_with("--") => {
            format!("{}{}", &arg[..value], shareable_value(&arg[..value], &arg[value..]))
        }
        _ => shareable_value(flag, arg),
    }
}

fn shareable_value(flag: &str, value: &str) -> String {
    match flag {
        flag if TEXT_FLAGS.contains(&flag) => without_homes(value),
        flag if MODEL_FLAGS.contains(&flag) && is_hub_id(value) => value.into(),
        flag if MODEL_FLAGS.contains(&flag) => match is_path(value) {
            true => format!("{PLACEHOLDER}{}", folder_name(value)),
            false => value.into(),
        },
        flag if INPUT_FLAGS.contains(&flag) => format!("{PLACEHOLDER}{}", last_component(value)),
        _ => last_component(value).into(),
    }
}

/// A folder, whether it is there or not; a name of a built-in shape is none.
fn is_path(value: &str) -> bool {
    value.contains(['/', '\\']) || value.starts_with(['.', '~']) || Path::new(value).is_dir()
}

/// The last component; that of the folder itself for `.` and `..`.
fn folder_name(value: &str) -> String {
    let name = last_component(value);
    if !matches!(name, "" | "." | "..") {
        return name.to_owned();
    }
    let resolved = Path::new(value).canonicalize().ok();
    let name = resolved.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "model".to_owned())
}

/// Words of a text that lead into a home keep their last component.
fn without_homes(text: &str) -> String {
    let shareable = |word| if HOMES.iter().any(|home| str::contains(word, home)) { last_component(word) } else { word };
    text.split_inclusive(char::is_whitespace).map(shareable).collect()
}

/// `owner/name` that is no folder here.
fn is_hub_id(value: &str) -> bool {
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '~'])
            && part.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c))
    };
    value.split_once('/').is_some_and(|(owner, name)| word(owner) && word(name)) && !Path::new(value).exists()
}

fn last_component(value: &str) -> &str {
    let slash = ['/', '\\'];
    let trimmed = value.trim_end_matches(slash);
    trimmed.rsplit(slash).next().unwrap_or(trimmed)
}

/// Bare where a shell reads the word as it stands, else in single quotes.
pub fn quote(word: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-_=.,:/@%+".contains(c);
    if !word.is_empty() && word.chars().all(bare) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn hide_tokens(text: &str) -> String {
    let mut text = text.to_owned();
    for token in tokens(&text.clone()) {
        text = text.replace(token, "hf_***");
    }
    text
}

fn tokens(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices(TOKEN_PREFIX).filter_map(|(start, prefix)| {
        let rest = &text[start + prefix.len()..];
        let letters = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        (letters >= TOKEN_LETTERS).then(|| &text[start..start + prefix.len() + letters])
    })
}

/// What `text` must not hold if it is to be shared: hub tokens, paths into a home, and whichever of `known` (host name,
/// user name, a token's value; empty ones are skipped) occur in it. Tests hold every output against it.
pub fn private_words(text: &str, known: &[&str]) -> Vec<String> {
    let homes = HOMES.iter().filter(|home| text.contains(**home)).copied();
    let known = known.iter().filter(|word| !word.is_empty() && text.contains(**word)).copied();
    homes.chain(known).chain(tokens(text)).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_be_repeated_or_shows_what_is_missing() {
        let cases: &[(&[&str], &str)] = &[
            (&["/home/ann/bin/quantbench"], "quantbench"),
            (&["quantbench", "--model-id", "/srv/models/phi 2/"], "quantbench --model-id 'PATH/TO/phi 2'"),
            (&["quantbench", "--model-id", "no-such/hub-id"], "quantbench --model-id no-such/hub-id"),
            (&["quantbench", "--model-id=no-such/hub-id"], "quantbench --model-id=no-such/hub-id"),
            (&["quantbench", "-m", "no-such/hub-id", "-p", "8,512"], "quantbench -m no-such/hub-id -p 8,512"),
            (&["quantbench", "-mno-such/hub-id"], "quantbench -mno-such/hub-id"),
            (&["quantbench", "-m/srv/models/phi"], "quantbench -mPATH/TO/phi"),
            (&["quantbench", "--model-id", "../models/phi"], "quantbench --model-id PATH/TO/phi"),
            (&["quantbench", "--model-id", "./phi"], "quantbench --model-id PATH/TO/phi"),
            (&["quantbench", "--model-id", "~/phi"], "quantbench --model-id PATH/TO/phi"),
            (&["quantbench", "--model-id", "phi-2"], "quantbench --model-id phi-2"),
            (&["quantbench", "--model-id", "tests"], "quantbench --model-id PATH/TO/tests"),
            // An existing folder is a folder, although it looks like a hub id.
            (&["quantbench", "--model-id", "src/report"], "quantbench --model-id PATH/TO/report"),
            (&["quantbench", "--output=/tmp/x/r.json"], "quantbench --output=r.json"),
            (&["quantbench", "-o/tmp/x/r.json"], "quantbench -or.json"),
            (&["C:\\Users\\ann\\quantbench.exe", "--quiet"], "quantbench.exe --quiet"),
            (&["quantbench", "--prompt-file", "a/b/it's.txt"], r"quantbench --prompt-file 'PATH/TO/it'\''s.txt'"),
            (&["quantbench", "--prompt", "is 1/2 more?"], "quantbench --prompt 'is 1/2 more?'"),
            (&["quantbench", "--prompt", "sum up /home/ann/a.txt now"], "quantbench --prompt 'sum up a.txt now'"),
            (&["quantbench", "--prompt", "- is 1/2 more?"], "quantbench --prompt '- is 1/2 more?'"),
            (&["quantbench", "--prompt", "--a=/home/ann/b"], "quantbench --prompt b"),
            (&["quantbench", "--image=/srv/cat.png"], "quantbench --image=PATH/TO/cat.png"),
            (&["quantbench", "--prompt="], "quantbench --prompt="),
            (&["quantbench", "--prompt", ""], "quantbench --prompt ''"),
            (
                &["quantbench", "--prompt-ids", "1,2,3", "--device", "cuda:0"],
                "quantbench --prompt-ids 1,2,3 --device cuda:0",
            ),
            (&["quantbench", "--prompt", "hf_abcdefghijklmnop"], "quantbench --prompt 'hf_***'"),
            (&[], ""),
        ];
        for (args, expected) in cases {
            assert_eq!(shareable_command(args.iter().map(|arg| arg.to_string())), *expected, "{args:?}");
        }
    }

    #[test]
    fn private_words_are_found() {
        let cases: &[(&str, &[&str], &[&str])] = &[
            ("phi on two threads", &["box-7", ""], &[]),
            ("read /home/ann/m", &[], &["/home/"]),
            ("run on box-7", &["box-7"], &["box-7"]),
            ("key hf_0123456789abcdefXYZ.", &[], &["hf_0123456789abcdefXYZ"]),
            ("peers/hf_bnb", &[], &[]),
        ];
        for (text, known, expected) in cases {
            assert_eq!(private_words(text, known), *expected, "{text}");
        }
    }
}
