//! One case → records: workers, protocol, clock, memory, environment, validity, warnings. Never prints.
//!
//! Files here import each other, never this façade.

mod ab;
mod agreement;
pub mod assemble;
mod bandwidth_cache;
mod case;
mod checks;
pub mod clock;
pub mod compared;
pub mod doctor;
mod dry_run;
pub mod environment;
mod estimate;
mod exports;
mod largest;
pub mod load;
mod logits;
pub mod measure;
pub mod measured;
mod measurement_protocol;
mod open_model;
mod parent;
pub mod picture;
pub mod port;
mod prepare;
mod prompt;
mod quality;
mod random_ids;
mod room;
mod run_context;
pub mod schedule;
mod scoring;
pub mod served;
pub mod stopping;
mod streaming;
pub mod task;
mod validity;
pub mod warnings;
pub mod watch;
mod worker;
mod worker_process;

pub use ab::run_ab;
pub use case::{
    Case, DEFAULT_QUALITY_TOKENS, DeviceChoice, PrecisionSelection, PromptChoice, QualityChoice, Variant,
    engine_timeout_s,
};
pub use checks::device;
pub use dry_run::dry_run;
pub use environment::engine_info;
pub use estimate::DEFAULT_N_GEN;
pub use largest::with_largest_batches;
pub use measurement_protocol::{MeasurementProtocol, Method};
pub use open_model::{build, select};
pub use parent::{check, quality, run};
pub use prompt::DEFAULT_TEXT;
pub use run_context::RunContext;
pub use warnings::LOGITS_NOT_SAVED;
pub use worker::worker_main;
pub use worker_process::SUBCOMMAND;
