//! A model in parts that may differ in how much quantizing them costs: attention, experts, router, mlp, head, embeddings and each layer.

use crate::weights::spec::{MatrixSpec, Role};

/// Matrices under a name. That of a layer is the pattern that keeps it in fp16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub name: String,
    /// Names of tensors.
    pub matrices: Vec<String>,
    pub is_layer: bool,
}

/// All groups that have a matrix, from large to small. Linear layers that stay fp16 at every precision are in none.
pub fn groups(matrices: &[MatrixSpec]) -> Vec<Group> {
    let mut groups = Vec::new();
    let parts: [(&str, fn(&MatrixSpec) -> bool); 6] = [
        ("attention", |spec| spec.role == Role::Projection && is_attention(&spec.name)),
        ("experts", |spec| spec.role == Role::Expert),
        ("router", |spec| spec.role == Role::Router),
        ("mlp", |spec| spec.role == Role::Projection && !is_attention(&spec.name)),
        ("head", |spec| spec.role == Role::Head),
        // Also where a tied head shares the table.
        ("embeddings", |spec| spec.role == Role::Embedding),
    ];
    for (name, belongs) in parts {
        let named = matrices.iter().filter(|spec| belongs(spec)).map(|spec| spec.name.clone());
        groups.push(Group { name: name.to_owned(), matrices: named.collect(), is_layer: false });
    }
    for spec in matrices.iter().filter(|spec| spec.role.is_quantized()) {
        let Some(layer) = layer(&spec.name) else { continue };
        match groups.iter_mut().find(|group| group.is_layer && group.name == layer) {
            Some(group) => group.matrices.push(spec.name.clone()),
            None => groups.push(Group { name: layer, matrices: vec![spec.name.clone()], is_layer: true }),
        }
    }
    groups.retain(|group| !group.matrices.is_empty());
    groups
}

fn is_attention(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("attn") || name.contains("attention")
}

/// The name up to the first number: `model.layers.3`.
fn layer(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    let number = parts.iter().position(|part| part.parse::<usize>().is_ok())?;
    Some(parts[..=number].join("."))
}

/// Cost and saving of quantizing one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCost<'a> {
    pub name: &'a str,
    pub kl_mean: f64,
    pub saved_bytes: u64,
}

/// Layers that cost more than this many times the median layer's divergence per byte saved are worth keeping in fp16.
const SENSITIVE: f64 = 2.0;

/// Names of the layers worth keeping in fp16, the most sensitive first.
pub fn sensitive<'a>(layers: &[LayerCost<'a>]) -> Vec<&'a str> {
    let price = |layer: &LayerCost| layer.kl_mean / layer.saved_bytes.max(1) as f64;
    let Some(median) = crate::stats::median(&layers.iter().map(price).collect::<Vec<_>>()) else { return Vec::new() };
    let mut found: Vec<_> = layers.iter().filter(|layer| price(layer) > SENSITIVE * median).collect();
    found.sort_by(|a, b| price(b).total_cmp(&price(a)));
    found.into_iter().map(|layer| layer.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_linear_layer_is_in_a_part_and_a_layer() {
        let names = [
            ("model.embed_tokens.weight", Role::Embedding),
            ("model.layers.0.self_attn.q_proj.weight", Role::Projection),
            ("model.layers.0.mlp.up_proj.weight", Role::Projection),
            ("model.layers.10.mlp.up_proj.weight", Role::Kept),
            ("model.layers.1.self_attn.dense.weight", Role::Projection),
            ("decoder.block.1.layer.1.EncDecAttention.q.weight", Role::Projection),
        ];
        let spec = |&(name, role): &(&str, Role)| MatrixSpec {
            name: name.to_owned(),
            n: 1,
            k: 1,
            role,
            others: Vec::new(),
            held: None,
        };
        let groups = groups(&names.iter().map(spec).collect::<Vec<_>>());
        let found: Vec<_> = groups.iter().map(|group| (group.name.as_str(), group.matrices.len())).collect();
        let expected = [
            ("attention", 3),
            ("mlp", 1),
            ("embeddings", 1),
            ("model.layers.0", 2),
            ("model.layers.1", 1),
            ("decoder.block.1", 1),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_costs_much_for_its_bytes_is_sensitive() {
        let layer = |name, kl_mean, saved_bytes| LayerCost { name, kl_mean, saved_bytes };
        let layers = [
            layer("a", 0.1, 100),
            layer("b", 0.9, 100),
            layer("c", 0.1, 100),
            layer("d", 0.1, 20),
            layer("e", 0.1, 90),
        ];
        assert_eq!(sensitive(&layers), ["b", "d"]);
        assert!(sensitive(&[]).is_empty());
    }
}
