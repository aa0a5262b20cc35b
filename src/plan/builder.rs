//! What a model file writes its plan with.

use super::*;

/// Dotted checkpoint names: `Path::root().at("model").at("layers").at(3)`.
#[derive(Debug, Clone)]
pub struct Path(String);

impl Path {
    pub fn root() -> Self {
        Path(String::new())
    }

    pub fn at(&self, part: impl std::fmt::Display) -> Self {
        match self.0.as_str() {
            "" => Path(part.to_string()),
            prefix => Path(format!("{prefix}.{part}")),
        }
    }

    fn name(&self, leaf: &str) -> String {
        self.at(leaf).0
    }
}

/// A linear layer to be read by a group: its path, its outputs and whether it has a bias.
pub struct LinearLayer {
    pub path: Path,
    pub n: usize,
    pub bias: bool,
}

/// Collects the tensors of a model and the operations of its plan.
#[derive(Default)]
pub struct Builder {
    matrices: Vec<MatrixSpec>,
    vectors: Vec<VectorSpec>,
    caches: Vec<CacheSpec>,
    ropes: Vec<Rope>,
    buffers: Vec<Buffer>,
    ops: Vec<Op>,
}

impl Builder {
    pub fn new() -> Self {
        Self::default()
    }

    /// The matrix `{path}.weight`, `[n, k]`.
    pub fn matrix(&mut self, path: &Path, n: usize, k: usize, role: Role) -> MatrixId {
        self.matrices.push(MatrixSpec { name: path.name("weight"), n, k, role });
        MatrixId(self.matrices.len() - 1)
    }

    fn vector(&mut self, name: String, len: usize, kind: VectorKind) -> VectorId {
        self.vectors.push(VectorSpec { name, len, kind });
        VectorId(self.vectors.len() - 1)
    }

    pub fn rope(&mut self, rope: Rope) -> RopeId {
        self.ropes.push(rope);
        RopeId(self.ropes.len() - 1)
    }

    pub fn cache(&mut self, kv_heads: usize, head_dim: usize) -> CacheId {
        self.caches.push(CacheSpec { kv_heads, head_dim });
        CacheId(self.caches.len() - 1)
    }

    fn buffer(&mut self, name: &str, width: usize, rows: Rows) -> BufferId {
        self.buffers.push(Buffer { name: name.to_owned(), width, rows });
        BufferId(self.buffers.len() - 1)
    }

    fn width(&self, buffer: BufferId) -> usize {
        self.buffers[buffer.0].width
    }

    /// A buffer with the rows and width of `like`.
    fn same(&mut self, name: &str, like: BufferId) -> BufferId {
        let Buffer { width, rows, .. } = self.buffers[like.0];
        self.buffer(name, width, rows)
    }

    pub fn embed(&mut self, table: MatrixId) -> BufferId {
        let out = self.buffer("embedding", self.matrices[table.0].k, Rows::Tokens);
        self.ops.push(Op::Embed { table, out });
        out
    }

    pub fn rms_norm(&mut self, path: &Path, epsilon: f32, x: BufferId) -> BufferId {
        let weight = self.vector(path.name("weight"), self.width(x), VectorKind::NormWeight);
        self.norm(NormKind::Rms, weight, epsilon, x)
    }

    pub fn layer_norm(&mut self, path: &Path, epsilon: f32, x: BufferId) -> BufferId {
        let weight = self.vector(path.name("weight"), self.width(x), VectorKind::NormWeight);
        let bias = self.vector(path.name("bias"), self.width(x), VectorKind::Bias);
        self.norm(NormKind::Layer { bias }, weight, epsilon, x)
    }

    fn norm(&mut self, kind: NormKind, weight: VectorId, epsilon: f32, x: BufferId) -> BufferId {
        let out = self.same("norm", x);
        self.ops.push(Op::Norm { kind, weight, epsilon, x, out });
        out
    }

    /// Linear layers that read the same activations, as one group.
    pub fn linears<const N: usize>(&mut self, x: BufferId, layers: [LinearLayer; N]) -> [BufferId; N] {
        let (k, rows) = (self.width(x), self.buffers[x.0].rows);
        let parts = layers.map(|layer| {
            let weight = self.matrix(&layer.path, layer.n, k, Role::Projection);
            let bias = layer.bias.then(|| self.vector(layer.path.name("bias"), layer.n, VectorKind::Bias));
            LinearPart { weight, bias, out: self.buffer(&layer.path.0, layer.n, rows) }
        });
        let outs = std::array::from_fn(|i| parts[i].out);
        self.ops.push(Op::Linear { x, parts: parts.into() });
        outs
    }

    pub fn linear(&mut self, x: BufferId, path: Path, n: usize, bias: bool) -> BufferId {
        let [out] = self.linears(x, [LinearLayer { path, n, bias }]);
        out
    }

    pub fn rope_append(&mut self, q: BufferId, k: BufferId, v: BufferId, cache: CacheId, rope: RopeId) {
        self.ops.push(Op::RopeAppend { q, k, v, cache, rope });
    }

    pub fn attention(&mut self, q: BufferId, cache: CacheId, scale: f32, mask: Mask) -> BufferId {
        let out = self.same("attention", q);
        self.ops.push(Op::Attention { q, cache, out, scale, mask });
        out
    }

    pub fn activate(&mut self, kind: ActivationKind, gate: BufferId, up: Option<BufferId>) -> BufferId {
        let out = self.same("activation", gate);
        self.ops.push(Op::Activate { kind, gate, up, out });
        out
    }

    /// `a += b`
    pub fn add_to(&mut self, a: BufferId, b: BufferId) {
        self.ops.push(Op::Add { a, b, out: a });
    }

    /// The head over the last token, and the next token from it. `bias` names a head that has one.
    pub fn head(&mut self, x: BufferId, weight: MatrixId, bias: Option<&Path>) {
        let last = self.buffer("last", self.width(x), Rows::Last);
        self.ops.push(Op::LastRow { x, out: last });
        let vocab = self.matrices[weight.0].n;
        let bias = bias.map(|path| self.vector(path.name("bias"), vocab, VectorKind::Bias));
        let logits = self.buffer("logits", vocab, Rows::Last);
        self.ops.push(Op::Linear { x: last, parts: vec![LinearPart { weight, bias, out: logits }] });
        self.ops.push(Op::Argmax { logits });
    }

    pub fn finish(self, architecture: &'static str, context: usize, vocab: usize, eos: Vec<u32>) -> Model {
        Model {
            architecture,
            matrices: self.matrices,
            vectors: self.vectors,
            caches: self.caches,
            ropes: self.ropes,
            decoder: Plan { buffers: self.buffers, ops: self.ops },
            context,
            vocab,
            eos,
        }
    }
}
