//! Experts as transformers 5 saves them, in 3-D tensors, give what a matrix for each gives.

use std::collections::BTreeMap;

use quantbench::events::Silent;
use quantbench::weights::{self, ModelRequest};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};

use super::{checkpoint, plan, root};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn read(model: &str) -> Tensors {
    let bytes = std::fs::read(root().join("models").join(model).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView)| (name, (view.shape().to_vec(), view.data().to_vec()));
    tensors.tensors().into_iter().map(tensor).collect()
}

/// Moves the experts of every layer into `experts.gate_up_proj` and `experts.down_proj`, and names the modules as transformers 5 does.
fn pack(tensors: &mut Tensors, matrices: [&str; 3]) {
    let mut packed: Tensors = BTreeMap::new();
    let is_expert = |name: &String| name.contains(".experts.");
    let layers: std::collections::BTreeSet<String> = tensors
        .keys()
        .filter(|name| is_expert(name))
        .map(|name| name.split(".experts.").next().unwrap().to_owned())
        .collect();
    for layer in layers {
        let of = |expert: usize, which: usize| format!("{layer}.experts.{expert}.{}.weight", matrices[which]);
        let mlp = layer.replace("block_sparse_moe", "mlp");
        for (name, parts) in [("gate_up_proj", &[0, 1][..]), ("down_proj", &[2])] {
            let (mut bytes, mut count, mut shape) = (Vec::new(), 0, Vec::new());
            while tensors.contains_key(&of(count, 0)) {
                for which in parts {
                    let (of_part, data) = &tensors[&of(count, *which)];
                    shape = vec![of_part[0] * parts.len(), of_part[1]];
                    bytes.extend_from_slice(data);
                }
                count += 1;
            }
            shape.insert(0, count);
            packed.insert(format!("{mlp}.experts.{name}"), (shape, bytes));
        }
    }
    tensors.retain(|name, _| !is_expert(name));
    let renamed =
        std::mem::take(tensors).into_iter().map(|(name, value)| (name.replace("block_sparse_moe", "mlp"), value));
    packed.extend(renamed);
    *tensors = packed;
}

fn write(folder: &std::path::Path, model: &str, tensors: &Tensors) {
    std::fs::copy(root().join("models").join(model).join("config.json"), folder.join("config.json")).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (shape, data))| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn experts_in_3_d_tensors_are_the_same_matrices() {
    for (model, matrices) in
        [("mixtral-odd", ["w1", "w3", "w2"]), ("qwen3_moe-odd", ["gate_proj", "up_proj", "down_proj"])]
    {
        let plan = plan(model);
        let mut tensors = read(model);
        pack(&mut tensors, matrices);
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), model, &tensors);
        let packed = weights::open(&ModelRequest::of(folder.path().display().to_string()), &Silent).unwrap();
        let (own, packed) = (
            checkpoint(model).source(&plan.matrices, &plan.vectors).unwrap(),
            packed.source(&plan.matrices, &plan.vectors).unwrap(),
        );
        for spec in &plan.matrices {
            // From the second row on, so that ranges are read too.
            for rows in [0..spec.n, 1..spec.n] {
                let mut values = [vec![0.0; rows.len() * spec.k], vec![0.0; rows.len() * spec.k]];
                own.read_rows_f32(&spec.name, rows.clone(), &mut values[0]).unwrap();
                packed.read_rows_f32(&spec.name, rows.clone(), &mut values[1]).unwrap();
                assert_eq!(values[0], values[1], "{} {rows:?}", spec.name);
            }
            assert_eq!(own.stored_bytes(&spec.name), packed.stored_bytes(&spec.name), "{}", spec.name);
        }
    }
}

/// A tensor of another shape is named with the shape that it must have.
#[test]
fn a_packed_tensor_of_another_shape_is_refused() {
    let model = "qwen3_moe-odd";
    let mut tensors = read(model);
    pack(&mut tensors, ["gate_proj", "up_proj", "down_proj"]);
    let name = tensors.keys().find(|name| name.ends_with("experts.gate_up_proj")).unwrap().clone();
    let (shape, data) = tensors.get_mut(&name).unwrap();
    shape[0] -= 1;
    data.truncate(shape.iter().product::<usize>() * 2);
    let shape = shape.clone();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), model, &tensors);
    let opened = weights::open(&ModelRequest::of(folder.path().display().to_string()), &Silent).unwrap();
    let plan = plan(model);
    let error = opened.source(&plan.matrices, &plan.vectors).err().expect("a refusal").to_string();
    let needed = [shape[0] + 1, shape[1], shape[2]];
    assert!(error.contains(&name) && error.contains(&format!("needs {needed:?}")), "{error}");
}
