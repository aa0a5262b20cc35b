//! One decode step: the launch that `lower::cuda` makes of the decoder's plan, over fixed memory, replayed as a graph.

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, sys};

use super::Weights;
use super::trace::Trace;
use crate::engine::OutlierColumns;
use crate::kernels::cuda::launch::{address, upload};
use crate::kernels::cuda::program::{Instruction, LoadedLaunch, TokenOutput};
use crate::kernels::cuda::rows::RowKernels;
use crate::lower::cuda::step::{Allocation, StepMemory, StepProgram, fused};

/// The launch of a step and the memory between its instructions.
pub struct DecodeStep {
    launch: LoadedLaunch,
    graph: Option<CudaGraph>,
    memory: StepMemory<CudaSlice<u8>>,
    /// Read by the launch.
    instructions: CudaSlice<Instruction>,
    trace: Option<Trace>,
    /// Columns that one step examines for outliers; the device counts those it finds.
    pub examined: OutlierColumns,
}

impl DecodeStep {
    /// `name` is what a trace is called, if one is wanted.
    pub fn new(weights: &Weights, name: &str) -> Result<Self> {
        let device = &weights.device;
        let fused = fused(weights)?;
        // Zeros for all: partial results are written before they are read.
        let memory =
            StepMemory::of(weights, &fused).try_map(|Allocation { bytes, .. }| device.alloc_zeros::<u8>(*bytes))?;
        let program = StepProgram::new(weights, &fused, &addresses(&memory, device))?;
        let experts = program.experts().as_flattened();
        if !experts.is_empty() {
            // SAFETY: the tables have the room that the memory was planned with.
            unsafe { upload(experts, address(&memory.experts, device), device) }?;
        }
        let instructions = device.clone_htod(program.instructions())?;
        let mut planned = program.plan(address(&instructions, device))?;
        let trace = Trace::wanted(name, program.instructions(), weights.properties.multiprocessors, device)?;
        planned.program.trace = trace.as_ref().map_or(0, |trace| trace.address(device));
        let launch = planned.load(device)?;
        Ok(Self { launch, graph: None, memory, instructions, trace, examined: program.examined() })
    }

    /// The token output of a call outside of a step; the token stands `advance` positions further on.
    pub fn token_output(&self, weights: &Weights, advance: usize) -> Result<TokenOutput> {
        addresses(&self.memory, &weights.device).token_output(weights, advance)
    }

    /// Puts a token where the next step reads it.
    pub fn place(&self, weights: &Weights, token: u32, position: usize, step: u32) -> Result<()> {
        let output = self.token_output(weights, 1)?;
        // SAFETY: all addresses are the session's; the token is in the table.
        Ok(unsafe { RowKernels { on: &weights.device }.place_token(&output, token, position, step) }?)
    }

    /// The counters that launches share.
    pub fn counters(&self, device: &CudaDevice) -> u64 {
        address(&self.memory.counters, device)
    }

    /// Writes the trace of the last step, where one is wanted.
    pub fn write_trace(&mut self, device: &CudaDevice) -> Result<()> {
        self.trace.as_mut().map_or(Ok(()), |trace| trace.write(device))
    }

    pub fn bytes(&self) -> usize {
        self.memory.iter().map(CudaSlice::len).sum::<usize>() + self.instructions.num_bytes()
    }

    /// Queues one step: as a graph, or as it is.
    pub fn run(&mut self, device: &CudaDevice, as_graph: bool) -> Result<()> {
        if !as_graph {
            return self.launch(device);
        }
        if self.graph.is_none() {
            let stream = device.cuda_stream();
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
            let launched = self.launch(device);
            let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
            launched?;
            let graph = graph?.context("capturing a step gave no graph")?;
            graph.upload()?;
            self.graph = Some(graph);
        }
        match &self.graph {
            Some(graph) => Ok(graph.launch()?),
            None => bail!("a step without its graph"),
        }
    }

    fn launch(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: all addresses come from the session's own memory, which lives as long as this step.
        Ok(unsafe { self.launch.launch(device) }?)
    }
}

fn addresses(memory: &StepMemory<CudaSlice<u8>>, device: &CudaDevice) -> StepMemory<u64> {
    memory.map(|slice| address(slice, device))
}
