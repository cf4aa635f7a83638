//! The one place where text that others have chosen (names, paths, what CRIU, a runtime or another host
//! says) becomes harmless: whatever is told goes through here, to the terminal, to a log, as JSON.
//!
//! A text is one line. What a terminal would obey, and what changes the order in which text is read,
//! is shown as an escape.

use std::fmt::Write;

use serde::Serialize;

/// Longest text that is told, in bytes: paths and messages are far below.
const MOST: usize = 8 << 10;

/// A text for people: one line, nothing in it that a terminal obeys, and no longer than is of use.
pub fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        if at >= MOST {
            let _ = write!(out, "… ({} bytes more)", text.len() - at);
            break;
        }
        match c {
            '\n' | '\r' | '\t' => out.extend(c.escape_default()),
            c if is_obeyed(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// A value as JSON on one line, every text of it whole; what a terminal would obey is escaped as JSON
/// has it.
pub fn json(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).unwrap_or_default();
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // These can only be in a string.
        match c {
            c if is_obeyed(c) => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out
}

/// Control characters (C0, DEL, C1), and those that turn text round or end a line: Unicode's UAX #9.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str =
        "a\u{1b}]0;OWNED\u{7}\u{9b}2J\u{7f}\rferry: fine\nhint: run rm\u{202e}txt\u{2066}";

    #[test]
    fn nothing_is_left_that_a_terminal_obeys() {
        let told = shown(NAME);
        assert_eq!(
            told,
            "a\\u{1b}]0;OWNED\\u{7}\\u{9b}2J\\u{7f}\\rferry: fine\\nhint: run rm\\u{202e}txt\\u{2066}"
        );
        assert_eq!(shown("Käse – 漢字 (ok)"), "Käse – 漢字 (ok)");
    }

    #[test]
    fn nobody_is_told_a_novel() {
        let told = shown(&"ä".repeat(1 << 20));
        assert!(told.len() < MOST + 100 && told.ends_with("bytes more)"), "{}", told.len());
        assert_eq!(shown(&"a".repeat(MOST)).len(), MOST);
    }

    #[test]
    fn json_is_harmless_and_loses_nothing() {
        let text = json(&serde_json::json!({ "name": NAME }));
        assert!(!text.contains(is_obeyed), "{text:?}");
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["name"], NAME);
    }
}
