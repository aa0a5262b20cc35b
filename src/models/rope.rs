//! Rotary settings as transformers 5.24 reads them (modeling_rope_utils.py), in either spelling: `rope_theta` and `rope_scaling`, or
//! `rope_parameters`.

use candle_core::{Error, Result};
use serde_json::Value;

use super::keys::Keys;
use super::rule::Rule;
use crate::weights::json::is_empty;

/// transformers' base where a file has none, for most families.
pub const DEFAULT_THETA: f64 = 10_000.0;

/// Keys of a rope section that change nothing where they are not asked for: text has one position where a picture has three.
const RULE: Rule = Rule { harmless: &[&["finetuned", "mrope_interleaved", "mrope_section"]], refused: &[] };

/// The rotary settings of a config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSettings {
    pub theta: f64,
    pub kind: RopeKind,
    pub(super) head_dim: usize,
    /// Elements of a head that rotate.
    pub(super) rotary_dim: usize,
    /// Positions that the model is configured for.
    pub(super) max_positions: usize,
}

/// How frequencies are made of `theta`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    Default,
    Linear {
        factor: f64,
    },
    /// As `Default` within `max_position_embeddings`; beyond, the base grows with the length.
    Dynamic {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original: f64,
    },
    Yarn(Yarn),
    LongRope {
        short_factor: Vec<f64>,
        long_factor: Vec<f64>,
        original: usize,
        attention_factor: f64,
    },
    /// The first part of a head's pairs rotates, by frequencies of the whole head.
    Proportional {
        factor: f64,
        rotated: f64,
    },
}

/// YaRN (Peng et al. 2023).
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    pub(super) factor: f64,
    pub(super) original: f64,
    pub(super) beta_fast: f64,
    pub(super) beta_slow: f64,
    pub(super) truncate: bool,
    pub(super) attention_factor: f64,
}

/// Values that a family's rotary settings start from.
#[derive(Debug, Clone, Copy)]
pub struct RopeBasis {
    pub head_dim: usize,
    pub rotary: Rotary,
    /// `max_position_embeddings`
    pub max_positions: usize,
    /// Base where a file has none.
    pub theta: f64,
    /// Positions before scaling, where a file does not say; `None` are those of the config.
    pub original: Option<usize>,
    /// True if older files call LongRoPE `su`.
    pub knows_su: bool,
}

/// How much of each head rotates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rotary {
    /// All of it: transformers' model file reads no `partial_rotary_factor`.
    Whole,
    /// So much, where a file does not say `partial_rotary_factor`.
    Part(f64),
}

impl RopeKind {
    /// As a config.json names it.
    pub fn name(&self) -> &'static str {
        match self {
            RopeKind::Default => "default",
            RopeKind::Linear { .. } => "linear",
            RopeKind::Dynamic { .. } => "dynamic",
            RopeKind::Llama3 { .. } => "llama3",
            RopeKind::Yarn(_) => "yarn",
            RopeKind::LongRope { .. } => "longrope",
            RopeKind::Proportional { .. } => "proportional",
        }
    }
}

impl RopeSettings {
    /// Fails on a scaling that is not computed here, on one whose keys are missing or mistyped, and on two kinds at once.
    pub fn read(keys: &Keys, basis: RopeBasis) -> Result<Self> {
        let (scaling, parameters) = (section(keys, "rope_scaling")?, section(keys, "rope_parameters")?);
        // `rope_scaling` takes the place of `rope_parameters` as a whole, its theta included.
        let theta = optional_positive(keys, "rope_theta")?.unwrap_or(basis.theta);
        let settings = Self::of(keys, scaling.as_ref().or(parameters.as_ref()), RopeBasis { theta, ..basis })?;
        if let (Some(scaling), Some(parameters)) = (&scaling, &parameters) {
            let part = if let Rotary::Part(part) = basis.rotary { part } else { 1.0 };
            let at = if scaling.has("partial_rotary_factor") { scaling } else { keys };
            let partial = at.optional_number("partial_rotary_factor")?;
            warn_of_both(keys, parameters, settings.theta, partial.unwrap_or(part))?;
        }
        Ok(settings)
    }

    /// Reads one section, where there is one, of the file that `keys` are the top of; `basis` has the base of sections without one.
    pub fn of(keys: &Keys, chosen: Option<&Keys>, basis: RopeBasis) -> Result<Self> {
        let RopeBasis { head_dim, rotary, max_positions, theta, original, knows_su } = basis;
        let inner = chosen.map(|rope| optional_positive(rope, "rope_theta")).transpose()?.flatten();
        let theta = inner.unwrap_or(theta);
        let partial_at = chosen.filter(|rope| rope.has("partial_rotary_factor")).unwrap_or(keys);
        keys.value("partial_rotary_factor");
        let partial = partial_at.optional_number("partial_rotary_factor")?;
        let outer_original = keys.optional_size("original_max_position_embeddings")?;
        let kind_name = match chosen.map_or(Ok("default"), kind_name)? {
            "su" if knows_su => "longrope",
            name => name,
        };
        let rotary_dim = match (rotary, kind_name) {
            // transformers rotates all of a head by the frequencies of a part of it: it ends with an error there.
            (Rotary::Whole, kind)
                if partial.is_some_and(|partial| partial != 1.0) && !matches!(kind, "default" | "proportional") =>
            {
                return Err(partial_at.refused("partial_rotary_factor", "this model rotates whole heads"));
            }
            (Rotary::Whole, _) => head_dim,
            (Rotary::Part(part), _) => (head_dim as f64 * partial.unwrap_or(part)) as usize,
        };
        if let (Rotary::Whole, "default", Some(part)) = (rotary, kind_name, partial.filter(|part| *part != 1.0)) {
            let message = format!(
                "config.json says `partial_rotary_factor` {part}, which this model does not read: whole heads rotate"
            );
            keys.report.note("config_key_not_read", message);
        }
        if rotary_dim < 2 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let message = format!(
                "config.json rotates {rotary_dim} of {head_dim} head elements; it must be even and 2 to {head_dim}"
            );
            return Err(Error::Msg(message));
        }
        let reader = Reader {
            rope: chosen,
            outer_original,
            original,
            max_positions,
            rotary_dim,
            part: partial.unwrap_or(1.0),
            theta,
        };
        let kind = reader.kind(kind_name)?;
        if let (RopeKind::Proportional { .. }, true) = (&kind, rotary_dim != head_dim) {
            return Err(partial_at.refused("partial_rotary_factor", "`proportional` means frequencies of a whole head"));
        }
        if let Some(rope) = chosen {
            rope.finish(&RULE)?;
        }
        let settings = Self { theta, kind, head_dim, rotary_dim, max_positions };
        keys.report.rope.replace(Some(settings.clone()));
        Ok(settings)
    }

    /// The same for other layers: unscaled, with a base of their own.
    pub fn plain(&self, theta: f64) -> Self {
        Self { theta, kind: RopeKind::Default, ..*self }
    }

    /// Positions that the model is made for. A dynamic scaling stretches those of the config by its factor.
    pub fn context(&self) -> usize {
        match &self.kind {
            RopeKind::Dynamic { factor } => (self.max_positions as f64 * factor.max(1.0)) as usize,
            _ => self.max_positions,
        }
    }

    /// Whether a whole context may begin with position 1: a last position of its own would change other frequencies.
    pub fn holds_from_one(&self) -> bool {
        !matches!(self.kind, RopeKind::Dynamic { .. } | RopeKind::LongRope { .. })
    }
}

/// The section of each type of layer under `rope_parameters`, where a file has these.
pub fn by_layer_type<'a>(keys: &Keys<'a>, layer_types: [&'static str; 2]) -> Result<Option<[Option<Keys<'a>>; 2]>> {
    let parameters = keys.raw("rope_parameters").and_then(Value::as_object);
    if !parameters.is_some_and(|all| layer_types.iter().any(|layer_type| all.contains_key(*layer_type))) {
        return Ok(None);
    }
    let Some(section) = keys.section("rope_parameters")? else { return Ok(None) };
    let [first, second] = layer_types;
    let sections = [section.section(first)?, section.section(second)?];
    section.finish(&RULE)?;
    Ok(Some(sections))
}

/// A rope section that says something.
fn section<'a>(keys: &Keys<'a>, key: &'static str) -> Result<Option<Keys<'a>>> {
    if keys.raw(key).is_none_or(is_empty) {
        return Ok(None);
    }
    let nested = keys.raw(key).and_then(Value::as_object).into_iter().flatten().find(|(_, value)| value.is_object());
    match nested {
        Some((layer_type, _)) => {
            let why = format!("it has settings for each type of layer (`{layer_type}`), and this model has one type");
            Err(keys.refused(key, &why))
        }
        None => keys.section(key),
    }
}

/// Says which of the two spellings is computed, where the other one says something else.
fn warn_of_both(keys: &Keys, parameters: &Keys, theta: f64, part: f64) -> Result<()> {
    let kind = kind_name(parameters)?;
    let differs = |key, computed: f64| -> Result<Option<String>> {
        let other = parameters.optional_number(key)?.filter(|other| *other != computed);
        Ok(other.map(|other| format!("`{key}` {other}, not {computed}")))
    };
    let mut said: Vec<String> =
        differs("rope_theta", theta)?.into_iter().chain(differs("partial_rotary_factor", part)?).collect();
    if kind != "default" {
        said.push(format!("`{kind}`"));
    }
    if !said.is_empty() {
        let message = format!(
            "config.json has `rope_scaling` and `rope_parameters`: as in transformers 5 the first is computed alone; the second says {}",
            said.join(", ")
        );
        keys.report.note("config_key_not_read", message);
    }
    Ok(())
}

/// `rope_type`, which older files call `type`. Fails where the two differ.
fn kind_name<'a>(rope: &Keys<'a>) -> Result<&'a str> {
    match (rope.optional_word("rope_type")?, rope.optional_word("type")?) {
        (Some(kind), Some(old)) if kind != old => {
            Err(rope.wrong("rope_type", &format!("the same as `type`, which is \"{old}\"")))
        }
        (kind, old) => Ok(kind.or(old).unwrap_or("default")),
    }
}

struct Reader<'k, 'a> {
    rope: Option<&'k Keys<'a>>,
    outer_original: Option<usize>,
    /// The family's default.
    original: Option<usize>,
    max_positions: usize,
    rotary_dim: usize,
    part: f64,
    theta: f64,
}

impl Reader<'_, '_> {
    fn kind(&self, name: &str) -> Result<RopeKind> {
        let Some(rope) = self.rope else { return Ok(RopeKind::Default) };
        Ok(match name {
            "default" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: positive(rope, "factor")? },
            // The base grows by a power of dim / (dim − 2).
            "dynamic" if self.rotary_dim <= 2 => {
                return Err(rope.refused("rope_type", "heads of two elements have one frequency, which cannot grow"));
            }
            "dynamic" => RopeKind::Dynamic { factor: positive(rope, "factor")? },
            "llama3" => RopeKind::Llama3 {
                factor: positive(rope, "factor")?,
                low_freq_factor: positive(rope, "low_freq_factor")?,
                high_freq_factor: positive(rope, "high_freq_factor")?,
                original: self.original(rope)? as f64,
            },
            "yarn" => RopeKind::Yarn(self.yarn(rope)?),
            "longrope" => self.longrope(rope)?,
            "proportional" => RopeKind::Proportional {
                factor: optional_positive(rope, "factor")?.unwrap_or(1.0),
                rotated: match self.part {
                    part if (0.0..=1.0).contains(&part) => part,
                    _ => return Err(rope.wrong("partial_rotary_factor", "0 to 1")),
                },
            },
            _ => {
                let key = if rope.has("rope_type") { "rope_type" } else { "type" };
                let known = "`default`, `linear`, `dynamic`, `llama3`, `yarn`, `longrope`, `proportional`";
                return Err(
                    rope.refused(key, &format!("this kind of rotary scaling is not computed here; known are {known}"))
                );
            }
        })
    }

    /// Positions before scaling; the model's own key goes before the scaling's.
    fn original(&self, rope: &Keys) -> Result<usize> {
        let inner = rope.optional_size("original_max_position_embeddings")?;
        match self.outer_original.or(inner).or(self.original).unwrap_or(self.max_positions) {
            0 => Err(rope.wrong("original_max_position_embeddings", "a number above 0")),
            original => Ok(original),
        }
    }

    /// `factor`, which may be null for the ratio of the contexts.
    fn factor_or_ratio(&self, rope: &Keys, original: usize) -> Result<f64> {
        Ok(optional_positive(rope, "factor")?.unwrap_or(self.max_positions as f64 / original as f64))
    }

    fn yarn(&self, rope: &Keys) -> Result<Yarn> {
        let original = self.original(rope)?;
        if rope.raw("factor").is_none() {
            return Err(rope.wrong("factor", "a number above 0"));
        }
        if self.theta <= 1.0 {
            return Err(rope.refused("rope_theta", "yarn divides by its logarithm; it must be above 1"));
        }
        let factor = self.factor_or_ratio(rope, original)?;
        let scales = (rope.optional_number("mscale")?, rope.optional_number("mscale_all_dim")?);
        let attention_factor = match (optional_positive(rope, "attention_factor")?, scales) {
            (Some(given), _) => given,
            (None, (Some(scale), Some(all_dim))) if scale != 0.0 && all_dim != 0.0 => {
                yarn_scale(factor, scale) / yarn_scale(factor, all_dim)
            }
            (None, _) => yarn_scale(factor, 1.0),
        };
        // 0 counts as absent there.
        let beta = |key, default| match rope.optional_number(key)? {
            Some(beta) if beta < 0.0 => Err(rope.wrong(key, "a number above 0")),
            beta => Ok(beta.filter(|beta| *beta != 0.0).unwrap_or(default)),
        };
        Ok(Yarn {
            factor,
            original: original as f64,
            beta_fast: beta("beta_fast", 32.0)?,
            beta_slow: beta("beta_slow", 1.0)?,
            // Absent means true, null does not.
            truncate: match rope.raw("truncate") {
                None => true,
                Some(Value::Null) => false,
                Some(_) => rope.flag("truncate", true)?,
            },
            attention_factor,
        })
    }

    /// Short factors within the original context, long ones beyond.
    fn longrope(&self, rope: &Keys) -> Result<RopeKind> {
        let original = self.original(rope)?;
        let factors = |key| match rope.numbers(key)? {
            Some(factors) if factors.len() == self.rotary_dim / 2 && factors.iter().all(|factor| *factor > 0.0) => {
                Ok(factors)
            }
            _ => Err(rope.wrong(key, &format!("a list of {} numbers above 0", self.rotary_dim / 2))),
        };
        let (short_factor, long_factor) = (factors("short_factor")?, factors("long_factor")?);
        let factor = self.factor_or_ratio(rope, original)?;
        let attention_factor = match optional_positive(rope, "attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 || original < 2 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(RopeKind::LongRope { short_factor, long_factor, original, attention_factor })
    }
}

fn optional_positive(rope: &Keys, key: &'static str) -> Result<Option<f64>> {
    match rope.optional_number(key)? {
        Some(value) if value <= 0.0 => Err(rope.wrong(key, "a number above 0")),
        value => Ok(value),
    }
}

fn positive(rope: &Keys, key: &'static str) -> Result<f64> {
    optional_positive(rope, key)?.ok_or_else(|| rope.wrong(key, "a number above 0"))
}

/// YaRN's attention temperature (section 3.4), as a factor on cosine and sine.
fn yarn_scale(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}
