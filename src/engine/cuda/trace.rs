//! Traces of decode steps: with QUANTBENCH_TRACE=FOLDER the engine launches the step kernel's traced build, and writes a Chrome trace of
//! a decode step to that folder.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use serde_json::{Map, Value, json};

use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::program::Instruction;
use crate::kernels::cuda::trace::{self, TracedStep};

/// Names a folder for traces.
const VARIABLE: &str = "QUANTBENCH_TRACE";

/// The memory that stamps go to, and the file that is made of them.
pub struct Trace {
    words: CudaSlice<u32>,
    blocks: usize,
    labels: Vec<String>,
    /// For each instruction, those that it waits for.
    writers: Vec<Vec<usize>>,
    path: PathBuf,
    /// Repeats so far.
    repeats: u64,
}

impl Trace {
    /// A trace of these instructions on `blocks` blocks, where one is asked for; `name` is the file's.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn wanted(
        name: &str,
        instructions: &[Instruction],
        blocks: usize,
        device: &CudaDevice,
    ) -> Result<Option<Self>> {
        let Some(folder) = env::var_os(VARIABLE).filter(|folder| !folder.is_empty()) else { return Ok(None) };
        Ok(Some(Self {
            words: device.alloc_zeros(trace::words(blocks, instructions.len()))?,
            blocks,
            labels: instructions.iter().map(Instruction::label).collect(),
            writers: instructions.iter().map(Instruction::writers).collect(),
            path: PathBuf::from(folder).join(format!("{name}.json")),
            repeats: 0,
        }))
    }

    pub fn address(&self, device: &CudaDevice) -> u64 {
        address(&self.words, device)
    }

    /// Writes the last step of a repeat, if the device has done enough of them: of the first repeat, the second, the fourth and so on, since
    /// writing takes longer than a repeat.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, device: &CudaDevice) -> Result<()> {
        self.repeats += 1;
        if !self.repeats.is_power_of_two() {
            return Ok(());
        }
        let words = device.clone_dtoh(&self.words)?;
        let Some(step) = trace::last_step(&words, self.blocks, self.labels.len(), &self.writers) else { return Ok(()) };
        let explain = || format!("writing the trace {}", self.path.display());
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).with_context(explain)?;
        }
        fs::write(&self.path, self.chrome(&step).to_string()).with_context(explain)
    }

    /// As chrome://tracing and Perfetto read it: a thread for each block, times in microseconds.
    fn chrome(&self, step: &TracedStep) -> Value {
        let us = |ns: f64| (ns.round() / 1000.0).max(0.0);
        let events = step.spans.iter().filter(|span| span.ns >= 1.0).map(|span| {
            let of = span.instruction.map_or_else(String::new, |at| format!("{at}: {}", self.labels[at]));
            json!({
                "name": span.state.name(), "cat": of, "ph": "X", "pid": 0, "tid": span.block,
                "ts": us(span.start_ns), "dur": us(span.ns), "args": { "instruction": of },
            })
        });
        let states = step.by_state().into_iter().map(|(state, ns)| (state.name().to_owned(), json!(us(ns))));
        let pass = step.pass_ns.values().sum::<f64>();
        json!({
            "displayTimeUnit": "ns",
            "traceEvents": events.collect::<Vec<_>>(),
            "otherData": {
                "step_us": us(step.step_ns),
                "blocks": self.blocks,
                "instructions": self.labels.len(),
                "explained": step.explained(),
                "states_us": Map::from_iter(states),
                "passing_values_us": us(pass),
                "by_instruction_us": self.by_label(step),
            },
        })
    }

    /// For all instructions of one label: their number, and the states of one of them, the mean over blocks.
    fn by_label(&self, step: &TracedStep) -> Value {
        let mut all = Map::new();
        for label in self.labels.iter().collect::<BTreeSet<_>>() {
            let is_of = |at: &usize| self.labels[*at] == *label;
            let count = self.labels.iter().filter(|other| *other == label).count();
            let mut of_label = Map::from_iter([("count".to_owned(), json!(count))]);
            for span in step.spans.iter().filter(|span| span.instruction.is_some_and(|at| is_of(&at))) {
                let sum = of_label.entry(span.state.name()).or_insert(json!(0.0));
                let ns = span.ns / 1000.0 / (count * self.blocks) as f64;
                *sum = json!(sum.as_f64().unwrap_or(0.0) + ns);
            }
            let passed: Vec<f64> = step.pass_ns.iter().filter(|(at, _)| is_of(at)).map(|(_, ns)| *ns).collect();
            if !passed.is_empty() {
                of_label.insert("passing_values".to_owned(), json!(passed.iter().sum::<f64>() / 1000.0 / count as f64));
            }
            all.insert(label.clone(), Value::Object(of_label));
        }
        Value::Object(all)
    }
}
