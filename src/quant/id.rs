//! A row of the table of formats, and the handle by which everything below the command line names one.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::saved::SavedForm;
use super::{FORMATS, Format, FormatOptions, INTERNAL_FORMATS, STORED_FORMATS};

/// A row of [`FORMATS`]: what a format is called, and how the rest of the program treats it.
pub struct FormatEntry {
    /// Canonical name, as records have it: one name per arithmetic.
    pub name: &'static str,
    /// Other words a user may type for it.
    pub aliases: &'static [&'static str],
    /// One sentence for help and README.
    pub doc: &'static str,
    pub new: fn(FormatOptions) -> Box<dyn Format>,
    /// A variant of another format, such as NF4 without double quantization: `all` leaves it out.
    pub is_variant: bool,
    /// The same format without double quantization, where it has any.
    pub without_double_quant: Option<FormatId>,
    /// Holds the checkpoint's own values, and so do all other matrices, norm weights and biases at this precision.
    pub is_exact: bool,
    /// Files hold it: every matrix of such a file stays in the format that the file has it in. Norm weights and biases keep the checkpoint's own
    /// values.
    pub is_stored: bool,
    /// It is made at load of 16-bit weights, where it is asked for.
    pub is_made: bool,
    /// Has kernels for CUDA.
    pub runs_on_cuda: bool,
    /// Looks for outlier columns among the activations of each call. So its numbers depend on which tokens share a call, and
    /// records count the columns.
    pub finds_outliers: bool,
    /// The form in which bitsandbytes saves its matrices; `None` where it has none.
    pub saved: Option<&'static dyn SavedForm>,
    /// Bytes that the product of m rows of activations with an `[n, k]` matrix takes on a GPU beside both and the result.
    pub prefill_bytes: fn(usize, (usize, usize)) -> u64,
}

impl FormatEntry {
    /// A format that nothing treats specially.
    pub const fn plain(name: &'static str, doc: &'static str, new: fn(FormatOptions) -> Box<dyn Format>) -> Self {
        Self {
            name,
            aliases: &[],
            doc,
            new,
            is_variant: false,
            without_double_quant: None,
            is_exact: false,
            is_stored: false,
            is_made: true,
            runs_on_cuda: true,
            finds_outliers: false,
            saved: None,
            prefill_bytes: |_, _| 0,
        }
    }
}

/// A format of the table. It is made once, where a user's word or a message is parsed, and compared by identity; its name is
/// for messages and records.
#[derive(Clone, Copy)]
pub struct FormatId(&'static FormatEntry);

impl FormatId {
    pub const fn of(entry: &'static FormatEntry) -> Self {
        Self(entry)
    }

    /// Every format that can be asked for: [`FORMATS`], and those of [`STORED_FORMATS`] that are made.
    pub fn asked() -> impl Iterator<Item = Self> {
        FORMATS.iter().chain(STORED_FORMATS.iter().filter(|format| format.is_made)).copied()
    }

    /// The format of [`Self::asked`] whose name or alias is `word`.
    pub fn parse(word: &str) -> Option<Self> {
        Self::asked().find(|format| format.name == word || format.aliases.contains(&word))
    }

    /// The format of this canonical name, [`INTERNAL_FORMATS`] and [`STORED_FORMATS`] included: the way back from a record or a message.
    pub fn named(name: &str) -> Option<Self> {
        FORMATS.iter().chain(INTERNAL_FORMATS).chain(STORED_FORMATS.iter()).copied().find(|format| format.name == name)
    }
}

impl Deref for FormatId {
    type Target = FormatEntry;

    fn deref(&self) -> &FormatEntry {
        self.0
    }
}

impl PartialEq for FormatId {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for FormatId {}

impl Hash for FormatId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::ptr::hash(self.0, state);
    }
}

impl fmt::Display for FormatId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

impl fmt::Debug for FormatId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Serialize for FormatId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for FormatId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::named(&name).ok_or_else(|| D::Error::custom(format!("no format is named `{name}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{fp16, fp32};

    #[test]
    fn an_id_travels_as_its_name() {
        for format in FORMATS.iter().chain(INTERNAL_FORMATS).chain(STORED_FORMATS.iter()) {
            let text = serde_json::to_string(format).unwrap();
            assert_eq!(text, format!("\"{}\"", format.name));
            assert_eq!(serde_json::from_str::<FormatId>(&text).unwrap(), *format);
        }
        let error = serde_json::from_str::<FormatId>("\"fp61\"").unwrap_err().to_string();
        assert!(error.starts_with("no format is named `fp61`"), "{error}");
        assert!(serde_json::from_str::<FormatId>("\"4bit\"").is_err(), "an alias is no canonical name");
    }

    #[test]
    fn words_of_users_name_what_can_be_asked_for() {
        assert_eq!(FormatId::parse("half"), Some(fp16::ID));
        assert_eq!(FormatId::parse(fp32::ID.name), None);
        assert_eq!(FormatId::parse("all"), None);
        assert_eq!(crate::record::BASELINE, crate::quant::BASELINE.name);
    }
}
