//! Repeated calls of many rows. The first call of a shape is planned by a dry run, which gives its memory, and runs launch by launch. The
//! second is captured as a graph, and later ones replay it: what they read is at the same addresses.

use std::collections::VecDeque;

use anyhow::{Context, Result};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, sys};

use super::Weights;
use super::step::DecodeStep;
use crate::engine::memory::named;
use crate::kernels::cuda::arena::{Arena, Layout, Region};
use crate::kernels::cuda::launch::{MemoryPlanner, address, upload};
use crate::lower::cuda::{CallInput, CallKind, CallResult, CallShape, prefill};

/// Shapes that are kept: those of the last calls, of which a long prompt has some.
const SHAPES: usize = 16;

/// A call on a session's memory.
pub struct PrefillCall<'a> {
    pub weights: &'a Weights,
    /// Of a session of one sequence, whose head is a launch of the step's kernel.
    pub step: Option<&'a DecodeStep>,
    pub shape: CallShape,
}

impl PrefillCall<'_> {
    /// Queues all launches on the device.
    fn queue(&self, device: &CudaDevice, arena: &Arena, input: Region) -> Result<CallResult> {
        let done = prefill::run(self.weights, self.shape, device, arena, input)?;
        if let (Some(step), CallKind::Prompt) = (self.step, self.shape.kind) {
            let token = step.token_output(self.weights, self.shape.rows())?;
            let head = prefill::last_head(self.weights, self.shape, done, token, step.counters(device))?;
            // SAFETY: x holds rows of the call; all else is the session's.
            unsafe { head.load(device)?.launch(device) }?;
        }
        Ok(done)
    }
}

/// Copies `input` to `to`.
///
/// # Safety
/// `to` has room for it.
unsafe fn upload_input(input: &CallInput, to: u64, device: &CudaDevice) -> Result<()> {
    // SAFETY: the caller's promise.
    Ok(unsafe {
        match input {
            CallInput::Tokens(values) => upload(values, to, device),
            CallInput::Patches(values) => upload(values, to, device),
            CallInput::OnDevice => Ok(()),
        }
    }?)
}

/// The memory of calls, and the last shapes that they had.
#[derive(Default)]
pub struct PrefillGraphs {
    memory: Option<CudaSlice<u8>>,
    /// The most recent first.
    known: VecDeque<KnownShape>,
}

struct KnownShape {
    shape: CallShape,
    layout: Layout,
    /// The result of a call in this memory.
    done: Option<CallResult>,
    graph: Option<CudaGraph>,
}

impl PrefillGraphs {
    /// Queues `call`, as a graph from the second time on if it may be one.
    pub fn run(&mut self, call: &PrefillCall, input: &CallInput, as_graph: bool) -> Result<CallResult> {
        let device = &call.weights.device;
        let base = self.prepare(call, input.bytes())?;
        let Some(known) = self.known.front_mut() else { anyhow::bail!("a call that was not prepared") };
        let arena = Arena::at(base, &known.layout);
        let region = arena.take::<u8>(input.bytes())?;
        // SAFETY: the region is as large.
        unsafe { upload_input(input, region.address, device) }?;
        if let (Some(done), Some(graph)) = (known.done, &known.graph) {
            graph.launch()?;
            return Ok(done);
        }
        if known.done.is_none() || !as_graph {
            let done = call.queue(device, &arena, region)?;
            known.done = Some(done);
            return Ok(done);
        }
        let stream = device.cuda_stream();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let queued = call.queue(device, &arena, region);
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        let explain = || format!("capturing {:?}", call.shape);
        let done = queued.with_context(explain)?;
        let graph = graph.with_context(explain)?.with_context(explain)?;
        graph.launch()?;
        known.graph = Some(graph);
        Ok(done)
    }

    /// Bytes of memory that are held for the next call.
    pub fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, CudaSlice::len)
    }

    /// Moves the call's shape to the front and makes sure of memory for it; returns its address. Memory of the largest call is kept: long prompts
    /// are cut, so that none is far larger than others.
    fn prepare(&mut self, call: &PrefillCall, input_bytes: usize) -> Result<u64> {
        let at = self.known.iter().position(|known| known.shape == call.shape);
        let mut known = match at.and_then(|at| self.known.remove(at)) {
            Some(known) => known,
            None => {
                let layout = Layout::of(|arena| {
                    let planned = arena.take::<u8>(input_bytes).map_err(anyhow::Error::from);
                    planned
                        .and_then(|input| prefill::run(call.weights, call.shape, &MemoryPlanner, arena, input))
                        .map(|_| ())
                })?;
                KnownShape { shape: call.shape, layout, done: None, graph: None }
            }
        };
        let bytes = known.layout.bytes().max(self.bytes()).max(1);
        let device = &call.weights.device;
        if bytes != self.bytes() {
            for known in self.known.iter_mut().chain([&mut known]) {
                (known.done, known.graph) = (None, None);
            }
            // Freed before the larger allocation.
            self.memory = None;
            // SAFETY: a call writes what it takes before it reads it.
            let memory = unsafe { device.alloc::<u8>(bytes) };
            let (rows, position) = (call.shape.rows(), call.shape.position());
            let what = || format!("activations of {rows} tokens behind {position}");
            self.memory = Some(named(memory, bytes, what)?);
        }
        self.known.push_front(known);
        self.known.truncate(SHAPES);
        Ok(self.memory.as_ref().map_or(0, |memory| address(memory, device)))
    }
}
