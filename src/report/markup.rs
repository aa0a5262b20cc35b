//! Text as HTML and XML have it: what comes from outside is never markup.

use super::case::plain;

/// Text and attribute values.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

/// Any text from outside: one line, no markup.
pub fn line(text: &str) -> String {
    escape(&plain(text))
}

/// The same with what stands in backticks as code.
pub fn prose(text: &str) -> String {
    let text = plain(text);
    let parts: Vec<&str> = text.split('`').collect();
    // An odd number of marks pairs none with the last.
    let paired = parts.len() - usize::from(parts.len().is_multiple_of(2));
    let part = |(at, part): (usize, &&str)| match at {
        at if at >= paired => format!("`{}", escape(part)),
        at if at % 2 == 1 => format!("<code>{}</code>", escape(part)),
        _ => escape(part),
    };
    parts.iter().enumerate().map(part).collect()
}

/// JSON that may stand in a `script` element, which ends at the first `</script`.
pub fn json(text: &str) -> String {
    text.replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backticks_are_code() {
        for (from, expected) in [
            ("use `--a <b>` now", "use <code>--a &lt;b&gt;</code> now"),
            ("`a` and `b`", "<code>a</code> and <code>b</code>"),
            ("a ` b", "a ` b"),
            ("`a` ` b", "<code>a</code> ` b"),
            ("", ""),
        ] {
            assert_eq!(prose(from), expected, "{from}");
        }
    }

    #[test]
    fn no_tag_ends_a_script() {
        let text = json(&serde_json::json!({"a": "</script><script>"}).to_string());
        assert!(!text.contains('<'), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["a"], "</script><script>");
    }
}
