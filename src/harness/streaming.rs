//! What a worker generates as text for people, while it generates it.

use std::sync::{Mutex, PoisonError};

use crate::events::{Event, Listener};

/// The text of ids, as a tokenizer decodes them.
pub type Decode<'a> = dyn Fn(&[u32]) -> Option<String> + Sync + 'a;

/// Relays every event, and in place of the tokens of a text its next pieces. A text that was seen is not shown again: every launch generates
/// the same one.
pub struct Streaming<'a> {
    rest: &'a dyn Listener,
    decode: &'a Decode<'a>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Option<(String, Pieces)>,
    seen: Vec<String>,
}

impl<'a> Streaming<'a> {
    pub fn new(rest: &'a dyn Listener, decode: &'a Decode<'a>) -> Self {
        Self { rest, decode, state: Mutex::default() }
    }

    fn token(&self, state: &mut State, label: String, id: u32) {
        if state.seen.contains(&label) {
            return;
        }
        let (label, pieces) = state.current.get_or_insert_with(|| (label, Pieces::default()));
        let text = pieces.push(id, self.decode);
        self.rest.on(Event::Text { label: label.clone(), text });
    }

    fn end(&self, state: &mut State) {
        let Some((label, pieces)) = state.current.take() else { return };
        let text = pieces.rest(self.decode);
        self.rest.on(Event::Text { label: label.clone(), text });
        state.seen.push(label);
        self.rest.on(Event::TextEnd);
    }
}

impl Listener for Streaming<'_> {
    fn on(&self, event: Event) {
        // A thread that panicked while it held the lock left a whole state.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Token { label, id } => self.token(&mut state, label, id),
            Event::TextEnd => self.end(&mut state),
            // A phase that ended before its text failed.
            Event::End => {
                self.end(&mut state);
                self.rest.on(Event::End);
            }
            other => self.rest.on(other),
        }
    }
}

/// Most ids that are decoded at once, and how many of the last stay where there are more: what a token means depends on a few before it.
const MOST_IDS: usize = 256;
const KEPT_IDS: usize = 128;

/// Splits the text of a growing list of ids into pieces, each of whole characters. All pieces together are the text of all ids.
#[derive(Default)]
struct Pieces {
    ids: Vec<u32>,
    /// Bytes of the ids' text that were given.
    given: usize,
}

impl Pieces {
    /// What `id` adds to the text. Empty where the id ends within a character: a tokenizer replaces the bytes of such a part by U+FFFD.
    fn push(&mut self, id: u32, decode: &Decode) -> String {
        self.ids.push(id);
        let text = decode(&self.ids).unwrap_or_default();
        let whole = whole_characters(&text);
        // Shorter than before where a piece of a character follows: nothing is taken back.
        let piece = whole.get(self.given..).unwrap_or_default().to_owned();
        self.given += piece.len();
        if self.ids.len() > MOST_IDS {
            self.ids.drain(..self.ids.len() - KEPT_IDS);
            let left = text.len() - self.given;
            self.given = decode(&self.ids).unwrap_or_default().len().saturating_sub(left);
        }
        piece
    }

    /// What is left at the end, whole or not.
    fn rest(self, decode: &Decode) -> String {
        decode(&self.ids).unwrap_or_default().get(self.given..).unwrap_or_default().to_owned()
    }
}

fn whole_characters(text: &str) -> &str {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Unit;

    /// Ids are bytes, as those of byte-level tokenizers; 256 is a special token, which has no text.
    fn bytes(ids: &[u32]) -> Option<String> {
        let bytes: Vec<u8> = ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Ids are words, as those of SentencePiece: a space before each but the first, and byte 0xE2 and so on for ids from 100.
    fn words(ids: &[u32]) -> Option<String> {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|id| if *id < 100 { format!(" w{id}").into_bytes() } else { vec![*id as u8] })
            .collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Some(text.strip_prefix(' ').unwrap_or(&text).to_owned())
    }

    fn pieces(ids: &[u32], decode: &Decode) -> Vec<String> {
        let mut pieces = Pieces::default();
        let mut all: Vec<String> = ids.iter().map(|id| pieces.push(*id, decode)).collect();
        all.push(pieces.rest(decode));
        all
    }

    #[test]
    fn a_character_that_is_split_over_tokens_comes_whole() {
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        assert_eq!(pieces(&ids("a€b"), &bytes), ["a", "", "", "€", "b", ""]);
        assert_eq!(pieces(&ids("🦀"), &bytes), ["", "", "", "🦀", ""]);
        // Cut off, broken in the middle, and a replacement character that the model means.
        assert_eq!(pieces(&ids("a€")[..3], &bytes), ["a", "", "", "\u{fffd}"]);
        assert_eq!(pieces(&[0xe2, 0x82, 0x28], &bytes), ["", "", "\u{fffd}(", ""]);
        assert_eq!(pieces(&ids("\u{fffd}!"), &bytes).concat(), "\u{fffd}!");
        assert_eq!(pieces(&[256, 97, 256, 98], &bytes), ["", "a", "", "b", ""]);
        assert_eq!(pieces(&[1, 2, 0xe2, 0x82, 0xac, 3], &words), ["w1", " w2", "", "", "€", " w3", ""]);
    }

    #[test]
    fn pieces_of_a_long_text_are_that_text() {
        let text = "Zoë zahlt 3 € für 🦀🦀 – тест 试验 \n\t".repeat(40);
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        assert!(ids.len() > 4 * MOST_IDS);
        assert_eq!(pieces(&ids, &bytes).concat(), text);
        let ids: Vec<u32> = (0..2000).map(|at| [7, 0xe2, 0x82, 0xac][at % 4]).collect();
        assert_eq!(Some(pieces(&ids, &words).concat()), words(&ids));
    }

    #[derive(Default)]
    struct Kept(Mutex<Vec<Event>>);

    impl Listener for Kept {
        fn on(&self, event: Event) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[test]
    fn tokens_become_texts_once_for_each_variant_and_the_rest_passes() {
        let kept = Kept::default();
        let streaming = Streaming::new(&kept, &bytes);
        let token = |label: &str, id| streaming.on(Event::Token { label: label.to_owned(), id });
        streaming.on(Event::Begin { label: "warm up fp16".to_owned(), total: 1, unit: Unit::Runs });
        token("fp16", 97);
        token("fp16", 0xe2);
        streaming.on(Event::TextEnd);
        streaming.on(Event::End);
        // A later launch, and another variant whose worker failed in the middle.
        token("fp16", 97);
        streaming.on(Event::TextEnd);
        token("nf4", 98);
        streaming.on(Event::End);
        let text = |label: &str, text: &str| Event::Text { label: label.to_owned(), text: text.to_owned() };
        let expected = [
            Event::Begin { label: "warm up fp16".to_owned(), total: 1, unit: Unit::Runs },
            text("fp16", "a"),
            text("fp16", ""),
            text("fp16", "\u{fffd}"),
            Event::TextEnd,
            Event::End,
            text("nf4", "b"),
            text("nf4", ""),
            Event::TextEnd,
            Event::End,
        ];
        assert_eq!(*kept.0.lock().unwrap(), expected);
    }
}
