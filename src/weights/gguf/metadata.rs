//! Keys and values of a GGUF file.

use std::collections::BTreeMap;
use std::fs::File;

use super::STRING;
use super::cursor::{Cursor, MAX_HEADER_BYTES};
use crate::error::BadInput;

/// ggml's own bound on a key.
const MAX_KEY_BYTES: u64 = 65_535;

/// Numbers of value types that have a fixed size, and that size.
const SIZES: &[(u32, u64)] =
    &[(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (10, 8), (11, 8), (12, 8)];
const ARRAY: u32 = 9;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    /// Its items stay in the file.
    List(List),
}

/// A list of values of one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct List {
    kind: u32,
    pub count: u64,
    /// Byte of the first item.
    at: u64,
}

/// All keys of a file.
#[derive(Debug, Default)]
pub struct Metadata(BTreeMap<String, MetaValue>);

impl Metadata {
    /// Reads `count` keys. Fails with [`BadInput`] on a type that is not known, a key that stands there twice, and on what is longer than the file.
    pub fn read(cursor: &mut Cursor, count: u64) -> Result<Self, BadInput> {
        // A key has a length, a type and a value.
        cursor.need_all(count, 8 + 4 + 1, &format!("a list of {count} keys"))?;
        let mut all = BTreeMap::new();
        for _ in 0..count {
            let key = cursor.text("a key", MAX_KEY_BYTES)?;
            let kind = cursor.u32("a type")?;
            let value = value(cursor, &key, kind)?;
            if all.insert(key.clone(), value).is_some() {
                return Err(cursor.bad(format!("it has the key `{key}` twice")));
            }
        }
        Ok(Self(all))
    }

    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.0.get(key)
    }

    /// Keys and values, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetaValue)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            MetaValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number that is not negative.
    pub fn count(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            MetaValue::Unsigned(value) => Some(value),
            MetaValue::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    pub fn float(&self, key: &str) -> Option<f64> {
        match *self.get(key)? {
            MetaValue::Float(value) => Some(value),
            _ => None,
        }
    }

    pub fn flag(&self, key: &str) -> Option<bool> {
        match *self.get(key)? {
            MetaValue::Flag(value) => Some(value),
            _ => None,
        }
    }
}

fn value(cursor: &mut Cursor, key: &str, kind: u32) -> Result<MetaValue, BadInput> {
    let what = format!("the value of `{key}`");
    Ok(match kind {
        0 => MetaValue::Unsigned(cursor.u8(&what)?.into()),
        1 => MetaValue::Signed((cursor.u8(&what)? as i8).into()),
        2 => MetaValue::Unsigned(cursor.u16(&what)?.into()),
        3 => MetaValue::Signed((cursor.u16(&what)? as i16).into()),
        4 => MetaValue::Unsigned(cursor.u32(&what)?.into()),
        5 => MetaValue::Signed((cursor.u32(&what)? as i32).into()),
        6 => MetaValue::Float(f32::from_bits(cursor.u32(&what)?).into()),
        7 => MetaValue::Flag(cursor.u8(&what)? != 0),
        STRING => MetaValue::Text(cursor.text(&what, MAX_HEADER_BYTES)?),
        10 => MetaValue::Unsigned(cursor.u64(&what)?),
        11 => MetaValue::Signed(cursor.u64(&what)? as i64),
        12 => MetaValue::Float(f64::from_bits(cursor.u64(&what)?)),
        ARRAY => MetaValue::List(list(cursor, &what)?),
        other => return Err(cursor.bad(format!("{what} is of type {other}, which is not known"))),
    })
}

/// Passes over the items.
fn list(cursor: &mut Cursor, what: &str) -> Result<List, BadInput> {
    let (kind, count) = (cursor.u32(what)?, cursor.u64(what)?);
    let at = cursor.at();
    match SIZES.iter().find(|(known, _)| *known == kind) {
        Some((_, size)) => {
            cursor.need_all(count, *size, what)?;
            cursor.skip(count * size, what)?;
        }
        None if kind == STRING => {
            cursor.need_all(count, 8, what)?;
            for _ in 0..count {
                let length = cursor.u64(what)?;
                cursor.skip(length, what)?;
            }
        }
        None => return Err(cursor.bad(format!("{what} is a list of type {kind}, which is not read"))),
    }
    Ok(List { kind, count, at })
}

impl List {
    /// The items of a list of texts, of at most `most`; `None` where it is none, or longer.
    pub fn texts(&self, (file, name, bytes): (&File, &str, u64), most: u64) -> Result<Option<Vec<String>>, BadInput> {
        if self.kind != STRING || self.count > most {
            return Ok(None);
        }
        let mut cursor = Cursor::new(file, name, self.at, bytes)?;
        (0..self.count).map(|_| cursor.text("an item of a list", MAX_HEADER_BYTES)).collect::<Result<_, _>>().map(Some)
    }

    /// The items of a list of 32-bit integers, of at most `most`; `None` where it is none, or longer.
    pub fn integers(&self, (file, name, bytes): (&File, &str, u64), most: u64) -> Result<Option<Vec<i64>>, BadInput> {
        if !matches!(self.kind, 4 | 5) || self.count > most {
            return Ok(None);
        }
        let mut cursor = Cursor::new(file, name, self.at, bytes)?;
        let item = |value: u32| if self.kind == 5 { i64::from(value as i32) } else { i64::from(value) };
        (0..self.count).map(|_| cursor.u32("an item of a list").map(item)).collect::<Result<_, _>>().map(Some)
    }
}
