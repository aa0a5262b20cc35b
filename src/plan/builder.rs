//! The builder that model files write their plans with.

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

    pub fn name(&self, leaf: &str) -> String {
        self.at(leaf).0
    }
}

/// A linear layer to be read by a group: its path, its outputs and whether it has a bias.
pub struct LinearLayer {
    pub path: Path,
    pub n: usize,
    pub bias: bool,
}

/// Collects the tensors of a model and the operations of its plans, one plan after the other.
#[derive(Default)]
pub struct Builder {
    matrices: Vec<MatrixSpec>,
    vectors: Vec<VectorSpec>,
    caches: Vec<CacheShape>,
    ropes: Vec<Rope>,
    biases: Vec<RelativeBias>,
    buffers: Vec<Buffer>,
    ops: Vec<Op>,
    /// Queries that the next attention over them rotates.
    rotated: Option<(BufferId, RopeId)>,
    encoder: Option<Encoder>,
}

/// Experts and how a token chooses among them.
pub struct Mixture {
    pub experts: Vec<Expert>,
    pub top_k: usize,
    pub weighting: ExpertWeighting,
    pub activation: GatedActivation,
}

/// Metadata of a model from config.json, beside its plan.
pub struct ModelMetadata {
    pub architecture: &'static str,
    pub context: usize,
    pub vocab: usize,
    pub eos: Vec<u32>,
    pub decoder_start: Option<u32>,
}

impl Builder {
    pub fn new() -> Self {
        Self::default()
    }

    /// The matrix `{path}.weight`, `[n, k]`.
    pub fn matrix(&mut self, path: &Path, n: usize, k: usize, role: Role) -> MatrixId {
        self.packed_matrix(MatrixSpec { name: path.name("weight"), n, k, role, others: Vec::new(), held: None })
    }

    /// A matrix that files may hold under other names too.
    pub fn packed_matrix(&mut self, spec: MatrixSpec) -> MatrixId {
        self.matrices.push(spec);
        MatrixId(self.matrices.len() - 1)
    }

    fn vector(&mut self, name: String, len: usize, kind: VectorKind) -> VectorId {
        self.packed_vector(VectorSpec { name, len, kind, others: Vec::new() })
    }

    /// A vector that files may hold under other names too.
    pub fn packed_vector(&mut self, spec: VectorSpec) -> VectorId {
        self.vectors.push(spec);
        VectorId(self.vectors.len() - 1)
    }

    /// The vector `path` itself, without a `weight` behind it.
    pub fn parameter(&mut self, path: &Path, len: usize) -> VectorId {
        self.vector(path.0.clone(), len, VectorKind::Bias)
    }

    /// The weight of an RMS norm over `len` elements; `kind` says what the checkpoint holds of it.
    pub fn rms_weight(&mut self, path: &Path, len: usize, kind: VectorKind, epsilon: f32) -> Norm {
        Norm { kind: NormKind::Rms, weight: self.vector(path.name("weight"), len, kind), epsilon }
    }

    pub fn rope(&mut self, rope: Rope) -> RopeId {
        self.ropes.push(rope);
        RopeId(self.ropes.len() - 1)
    }

    pub fn relative_bias(&mut self, bias: RelativeBias) -> BiasId {
        self.biases.push(bias);
        BiasId(self.biases.len() - 1)
    }

    pub fn cache(&mut self, kv_heads: usize, head_dim: usize, scope: CacheScope) -> CacheId {
        self.windowed_cache(kv_heads, head_dim, scope, None)
    }

    /// A cache of which attention sees the positions of a window.
    pub fn windowed_cache(
        &mut self,
        kv_heads: usize,
        head_dim: usize,
        scope: CacheScope,
        window: Option<Window>,
    ) -> CacheId {
        self.caches.push(CacheShape { kv_heads, head_dim, scope, window: window.map(|Window(window)| window) });
        CacheId(self.caches.len() - 1)
    }

    fn buffer(&mut self, name: &str, width: usize, rows: Rows) -> BufferId {
        self.buffers.push(Buffer { name: name.to_owned(), width, rows });
        BufferId(self.buffers.len() - 1)
    }

    pub fn width(&self, buffer: BufferId) -> usize {
        self.buffers[buffer.0].width
    }

    /// A buffer with the rows and width of `like`.
    fn same(&mut self, name: &str, like: BufferId) -> BufferId {
        let Buffer { width, rows, .. } = self.buffers[like.0];
        self.buffer(name, width, rows)
    }

    pub fn embed(&mut self, table: MatrixId) -> BufferId {
        self.embed_scaled(table, 1.0, None)
    }

    pub fn embed_scaled(&mut self, table: MatrixId, scale: f32, image: Option<u32>) -> BufferId {
        let out = self.buffer("embedding", self.matrices[table.0].k, Rows::Tokens);
        self.ops.push(Op::Embed(EmbedSpec { table, scale, image, out }));
        out
    }

    /// Patches of a picture with `channels` channels.
    pub fn patches(&mut self, picture: Picture, channels: usize) -> BufferId {
        let out = self.buffer("patches", channels * picture.patch * picture.patch, Rows::Tokens);
        self.ops.push(Op::Patches(PatchesSpec { out }));
        out
    }

    pub fn add_rows(&mut self, x: BufferId, table: MatrixId) {
        self.ops.push(Op::AddRows(AddRowsSpec { x, table }));
    }

    pub fn features(&mut self, x: BufferId) {
        self.ops.push(Op::Features(FeaturesSpec { x }));
    }

    pub fn rms_norm(&mut self, path: &Path, epsilon: f32, x: BufferId) -> BufferId {
        let weight = self.vector(path.name("weight"), self.width(x), VectorKind::NormWeight);
        self.norm(NormKind::Rms, weight, epsilon, x)
    }

    /// A norm whose checkpoint holds `weight − 1`, as Gemma's does.
    pub fn rms_norm_offset(&mut self, path: &Path, epsilon: f32, x: BufferId) -> BufferId {
        let weight = self.vector(path.name("weight"), self.width(x), VectorKind::NormOffset);
        self.norm(NormKind::Rms, weight, epsilon, x)
    }

    pub fn layer_norm(&mut self, path: &Path, epsilon: f32, x: BufferId) -> BufferId {
        let weight = self.vector(path.name("weight"), self.width(x), VectorKind::NormWeight);
        let bias = self.vector(path.name("bias"), self.width(x), VectorKind::Bias);
        self.norm(NormKind::Layer { bias }, weight, epsilon, x)
    }

    fn norm(&mut self, kind: NormKind, weight: VectorId, epsilon: f32, x: BufferId) -> BufferId {
        let out = self.same("norm", x);
        self.ops.push(Op::Norm(NormSpec { norm: Norm { kind, weight, epsilon }, x, out }));
        out
    }

    /// Linear layers that read the same activations, as one group.
    pub fn linears<const N: usize>(&mut self, x: BufferId, layers: [LinearLayer; N]) -> [BufferId; N] {
        self.linears_as(Role::Projection, x, layers)
    }

    pub fn linears_as<const N: usize>(&mut self, role: Role, x: BufferId, layers: [LinearLayer; N]) -> [BufferId; N] {
        let (k, rows) = (self.width(x), self.buffers[x.0].rows);
        let parts = layers.map(|layer| {
            let weight = self.matrix(&layer.path, layer.n, k, role);
            let bias = layer.bias.then(|| self.vector(layer.path.name("bias"), layer.n, VectorKind::Bias));
            LinearPart { weight, rows: None, bias, out: self.buffer(&layer.path.0, layer.n, rows) }
        });
        let outs = std::array::from_fn(|i| parts[i].out);
        self.ops.push(Op::Linear(LinearSpec { x, parts: parts.into() }));
        outs
    }

    /// Linear layers that the checkpoint holds as one matrix, `sizes` rows of each.
    pub fn fused_linears<const N: usize>(&mut self, x: BufferId, path: &Path, sizes: [usize; N]) -> [BufferId; N] {
        let (k, rows) = (self.width(x), self.buffers[x.0].rows);
        let weight = self.matrix(path, sizes.iter().sum(), k, Role::Projection);
        let mut start = 0;
        let parts = sizes.map(|len| {
            let part = LinearPart {
                weight,
                rows: Some(MatrixRows { start, len }),
                bias: None,
                out: self.buffer(&path.0, len, rows),
            };
            start += len;
            part
        });
        let outs = std::array::from_fn(|i| parts[i].out);
        self.ops.push(Op::Linear(LinearSpec { x, parts: parts.into() }));
        outs
    }

    /// Another name that files may have for the matrix whose product is `out`.
    pub fn also_named(&mut self, out: BufferId, path: &Path) {
        let parts =
            self.ops.iter().rev().filter_map(|op| if let Op::Linear(spec) = op { Some(&spec.parts) } else { None });
        let weight = parts.flatten().find(|part| part.out == out).map(|part| part.weight.0);
        if let Some(matrix) = weight.map(|weight| &mut self.matrices[weight]) {
            matrix.others.push(Elsewhere { tensor: path.name("weight"), slice: None });
        }
    }

    /// A mixture of experts over `x`, whose router's linear layer gave `scores`.
    pub fn experts(&mut self, x: BufferId, scores: BufferId, mixture: Mixture) -> BufferId {
        let out = self.same("experts", x);
        let Mixture { experts, top_k, weighting, activation } = mixture;
        self.ops.push(Op::Experts(ExpertsSpec { x, scores, experts, top_k, weighting, activation, out }));
        out
    }

    pub fn linear(&mut self, x: BufferId, path: Path, n: usize, bias: bool) -> BufferId {
        self.linear_as(Role::Projection, x, path, n, bias)
    }

    pub fn linear_as(&mut self, role: Role, x: BufferId, path: Path, n: usize, bias: bool) -> BufferId {
        let [out] = self.linears_as(role, x, [LinearLayer { path, n, bias }]);
        out
    }

    /// Keys and values for the cache, as they are. An attention over it that follows at once takes them into its own operation.
    pub fn append(&mut self, k: BufferId, v: BufferId, cache: CacheId) {
        self.ops.push(Op::Append(AppendSpec { kv: KeyValue { k, v }, cache }));
    }

    /// [`Self::append`] for an attention of `q` that rotates queries and keys.
    pub fn rope_append(&mut self, q: BufferId, k: BufferId, v: BufferId, cache: CacheId, rope: RopeId) {
        self.append(k, v, cache);
        self.rotated = Some((q, rope));
    }

    /// Attention of `q` over what was appended to `cache`.
    pub fn attention(&mut self, q: BufferId, cache: CacheId, scale: f32, mask: Mask, bias: Option<BiasId>) -> BufferId {
        let appended = self.ops.pop_if(|op| matches!(op, Op::Append(append) if append.cache == cache));
        let append = if let Some(Op::Append(AppendSpec { kv, cache: _ })) = appended { Some(kv) } else { None };
        let rope = self.rotated.take_if(|(of, _)| *of == q).map(|(_, rope)| rope);
        let out = self.attention_out(q);
        self.attend(AttentionSpec { append, scale, mask, rope, bias, ..AttentionSpec::over(q, cache, out) })
    }

    /// An attention as a model describes it; returns its output, for which [`Self::attention_out`] gives a buffer.
    pub fn attend(&mut self, spec: AttentionSpec) -> BufferId {
        self.ops.push(Op::Attention(spec));
        spec.out
    }

    /// A buffer for the output of an attention of `q`.
    pub fn attention_out(&mut self, q: BufferId) -> BufferId {
        self.same("attention", q)
    }

    pub fn activate(&mut self, kind: ActivationKind, gate: BufferId, up: Option<BufferId>) -> BufferId {
        let out = self.same("activation", gate);
        self.ops.push(Op::Activation(ActivationSpec { kind, gate, up, out }));
        out
    }

    /// `a += b`
    pub fn add_to(&mut self, a: BufferId, b: BufferId) {
        self.ops.push(Op::Add(AddSpec { a, b, out: a }));
    }

    /// The head over the last token times `scale`, and the next token from it. `bias` names a head that has one.
    pub fn head(&mut self, x: BufferId, scale: f32, weight: MatrixId, bias: Option<&Path>) {
        self.capped_head(x, scale, weight, bias, None);
    }

    /// [`Self::head`] with capped logits.
    pub fn capped_head(
        &mut self,
        x: BufferId,
        scale: f32,
        weight: MatrixId,
        bias: Option<&Path>,
        softcap: Option<Softcap>,
    ) {
        let last = self.buffer("last", self.width(x), Rows::Last);
        self.ops.push(Op::LastRow(LastRowSpec { x, out: last, scale }));
        let vocab = self.matrices[weight.0].n;
        let bias = bias.map(|path| self.vector(path.name("bias"), vocab, VectorKind::Bias));
        let logits = self.buffer("logits", vocab, Rows::Last);
        let parts = vec![LinearPart { weight, rows: None, bias, out: logits }];
        self.ops.push(Op::Linear(LinearSpec { x: last, parts }));
        self.ops.push(Op::Argmax(ArgmaxSpec { logits, softcap }));
    }

    /// Ends the encoder's plan; what follows is the decoder's.
    pub fn end_encoder(&mut self, input: EncoderInputKind) {
        let plan = Plan { buffers: std::mem::take(&mut self.buffers), ops: std::mem::take(&mut self.ops) };
        self.encoder = Some(Encoder { input, plan });
    }

    pub fn finish(self, metadata: ModelMetadata) -> Model {
        let mut model = Model {
            architecture: metadata.architecture,
            matrices: self.matrices,
            vectors: self.vectors,
            caches: self.caches,
            ropes: self.ropes,
            biases: self.biases,
            encoder: self.encoder,
            decoder: Plan { buffers: self.buffers, ops: self.ops },
            context: metadata.context,
            vocab: metadata.vocab,
            eos: metadata.eos,
            decoder_start: metadata.decoder_start,
        };
        for cache in 0..model.caches.len() {
            model.caches[cache].window = widest_window(&model, CacheId(cache));
        }
        model
    }
}

/// The most positions that an attention over `cache` sees; `None` where one sees all.
fn widest_window(model: &Model, cache: CacheId) -> Option<usize> {
    let specs = model.plans().flat_map(|plan| &plan.ops);
    let specs = specs.filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None });
    let windows = specs.filter(|spec| spec.cache == cache).map(|spec| spec.window.map(|Window(window)| window));
    windows.reduce(|widest, window| Some(widest?.max(window?))).flatten()
}
