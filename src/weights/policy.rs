//! Which format holds a matrix: what transformers converts by default, and what it leaves alone.

use std::collections::HashSet;

use super::spec::{MatrixSpec, Role};
use crate::quant::{self, Format, FormatId, FormatOptions};

/// The formats that hold a model at one precision.
pub struct Formats {
    precision: FormatId,
    asked: Box<dyn Format>,
    /// fp16; the precision itself where that is exact.
    unquantized: Box<dyn Format>,
    exact: Box<dyn Format>,
    /// Those that files hold and nothing makes.
    stored: Vec<Box<dyn Format>>,
}

impl Formats {
    pub fn new(precision: FormatId, options: FormatOptions) -> Self {
        let unquantized = if precision.is_exact { precision } else { quant::BASELINE };
        let make = |format: FormatId| (format.new)(options);
        Self {
            precision,
            asked: make(precision),
            unquantized: make(unquantized),
            exact: make(quant::EXACT),
            stored: quant::STORED_FORMATS.iter().map(|format| make(*format)).collect(),
        }
    }

    pub fn precision(&self) -> FormatId {
        self.precision
    }

    /// The precision's own format.
    pub fn asked(&self) -> &dyn Format {
        self.asked.as_ref()
    }

    /// Returns whether a matrix keeps the checkpoint's own values.
    pub fn is_exact(&self, spec: &MatrixSpec) -> bool {
        self.of(spec).id().is_exact
    }

    /// Returns whether norm weights and biases do.
    pub fn has_exact_vectors(&self) -> bool {
        self.precision.is_exact || self.precision.is_stored
    }

    /// Format of a matrix that the precision leaves alone.
    pub fn unquantized(&self) -> &dyn Format {
        self.unquantized.as_ref()
    }

    /// A file's own format where it has one. Else transformers' rule: it converts linear layers only, without the head; what an architecture
    /// lists in `_keep_in_fp32_modules` stays fp32 when the model's dtype is fp16.
    pub fn of(&self, spec: &MatrixSpec) -> &dyn Format {
        let all = || self.stored.iter().chain([&self.asked, &self.unquantized, &self.exact]);
        if let Some(held) = spec.held.and_then(|held| all().find(|format| format.id() == held.format)) {
            return held.as_ref();
        }
        match spec.role {
            Role::Projection | Role::Expert | Role::Router => self.asked.as_ref(),
            Role::Head | Role::Embedding | Role::Patches | Role::Kept => self.unquantized.as_ref(),
            Role::HighPrecision => self.exact.as_ref(),
        }
    }

    /// Bytes of a matrix as stored: what its file says, else what its format takes.
    pub fn stored_bytes(&self, spec: &MatrixSpec) -> u64 {
        spec.held.map_or_else(|| self.of(spec).stored_bytes(spec.n, spec.k) as u64, |held| held.bytes)
    }
}

/// Which matrices a precision quantizes.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Selection {
    /// Those that transformers quantizes.
    #[default]
    Usual,
    /// The same, but for linear layers that a pattern matches.
    Without(Vec<String>),
    /// The matrices of these names, whatever they are for, and no others.
    Only(Vec<String>),
}

impl Selection {
    /// Gives each matrix the role that follows. Fails with the first pattern that matches no linear layer.
    pub fn apply<'a>(&'a self, matrices: &mut [MatrixSpec]) -> std::result::Result<(), &'a str> {
        match self {
            Selection::Usual => {}
            Selection::Without(patterns) => {
                // What roles they had: a matrix that one pattern keeps is still found by another.
                let roles: Vec<Role> = matrices.iter().map(|spec| spec.role).collect();
                for pattern in patterns {
                    let mut found = false;
                    for (spec, role) in matrices.iter_mut().zip(&roles) {
                        let linear = role.is_quantized() || *role == Role::Kept;
                        if linear && (named_by_role(pattern, *role) || matches(pattern, &spec.name)) {
                            (spec.role, found) = (Role::Kept, true);
                        }
                    }
                    if !found {
                        return Err(pattern);
                    }
                }
            }
            Selection::Only(names) => {
                let names: HashSet<&str> = names.iter().map(String::as_str).collect();
                for spec in matrices {
                    match names.contains(spec.name.as_str()) {
                        true => spec.role = Role::Projection,
                        false if spec.role.is_quantized() => spec.role = Role::Kept,
                        false => {}
                    }
                }
            }
        }
        Ok(())
    }
}

/// The words for parts of a mixture, whatever a family calls their tensors.
fn named_by_role(pattern: &str, role: Role) -> bool {
    matches!((pattern, role), ("experts", Role::Expert) | ("router", Role::Router))
}

/// Whether the dotted components of `pattern` stand in `name` one behind the other; `*` in a component stands for anything
/// within it. `layers.1` matches layer 1 and not layer 10, `layers.1*` both.
fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    let name: Vec<&str> = name.split('.').collect();
    name.windows(pattern.len()).any(|names| names.iter().zip(&pattern).all(|(name, pattern)| component(pattern, name)))
}

fn component(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|behind| {
            let ends = (0..=behind.len()).filter(|at| behind.is_char_boundary(*at));
            ends.into_iter().any(|at| component(rest, &behind[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_components() {
        let name = "model.layers.1.mlp.down_proj.weight";
        for pattern in ["down_proj", "layers.1", "layers.1.mlp", "*", "layers.*.mlp", "down*", "*_proj", "d*n*j", name]
        {
            assert!(matches(pattern, name), "{pattern}");
        }
        for pattern in ["down", "layers.10", "layer.1", "mlp.1", "", "proj*", "layers.1.up_proj"] {
            assert!(!matches(pattern, name), "{pattern}");
        }
        assert!(!matches("layers.1", "model.layers.10.mlp.up_proj.weight"));
    }

    #[test]
    fn a_selection_changes_roles() {
        let spec =
            |name: &str, role| MatrixSpec { name: name.to_owned(), n: 1, k: 1, role, others: Vec::new(), held: None };
        let model = || {
            vec![
                spec("embed", Role::Embedding),
                spec("a.q.weight", Role::Projection),
                spec("b.q.weight", Role::Projection),
            ]
        };
        let roles = |selection: &Selection| {
            let mut matrices = model();
            selection.apply(&mut matrices).map(|()| matrices.iter().map(|spec| spec.role).collect::<Vec<_>>()).ok()
        };
        let (projection, kept, embedding) = (Role::Projection, Role::Kept, Role::Embedding);
        assert_eq!(roles(&Selection::Usual), Some(vec![embedding, projection, projection]));
        assert_eq!(roles(&Selection::Without(vec!["a".into()])), Some(vec![embedding, kept, projection]));
        assert_eq!(roles(&Selection::Without(vec!["a.q".into(), "q".into()])), Some(vec![embedding, kept, kept]));
        assert_eq!(roles(&Selection::Without(vec!["embed".into()])), None, "no linear layer");
        assert_eq!(roles(&Selection::Without(vec!["experts".into()])), None, "no mixture");
        let mut mixture = vec![spec("a.gate.weight", Role::Router), spec("a.e.0.w1.weight", Role::Expert)];
        let selection = Selection::Without(vec!["router".into(), "experts".into()]);
        selection.apply(&mut mixture).unwrap();
        assert_eq!([mixture[0].role, mixture[1].role], [kept; 2]);
        assert_eq!(roles(&Selection::Only(vec!["embed".into()])), Some(vec![projection, kept, kept]));
    }
}
