//! Facts that a record may lack, of another tool or of a case that never ran: `null` in JSON; empty, or 0 of what is never 0, in memory.

use std::collections::BTreeMap;

use super::{
    Bandwidth, DeviceFacts, Dtypes, EngineInfo, Environment, Memory, ModelFacts, Output, Protocol, Record, Samples,
    Status, WeightFacts, Workload,
};

impl Record {
    /// A record that knows nothing but its engine.
    pub fn unknown(engine: EngineInfo) -> Self {
        let nothing = String::new;
        Self {
            status: Status::Ok,
            reason: None,
            tainted: false,
            engine,
            file: nothing(),
            command: nothing(),
            timestamp: nothing(),
            model: ModelFacts { id: nothing(), revision: None, architecture: nothing(), parameters: 0, experts: None },
            weights: WeightFacts {
                source: nothing(),
                dtype: nothing(),
                seed: None,
                hash: nothing(),
                fp16_overflow: 0,
                fp16_overflow_by_tensor: BTreeMap::new(),
            },
            precision: nothing(),
            keep_fp16: Vec::new(),
            int8: None,
            device: DeviceFacts { kind: nothing(), name: nothing() },
            workload: Workload { n_prompt: 0, n_gen: 0, n_depth: 0, n_image: 0, image: None, batch_size: 1 },
            protocol: Protocol::default(),
            phases: BTreeMap::new(),
            samples: Samples::default(),
            metrics: BTreeMap::new(),
            dtypes: Dtypes { weights: nothing(), compute: nothing(), kv_cache: nothing(), logits: nothing() },
            ratio_to_fp16: None,
            break_even: None,
            memory: Memory::default(),
            bandwidth: Bandwidth::default(),
            energy: None,
            monitor: BTreeMap::new(),
            series: Vec::new(),
            output: Output::default(),
            self_check: None,
            quality: None,
            other_engine: None,
            agreement: None,
            environment: Environment::default(),
            card_bytes: None,
            warnings: Vec::new(),
        }
    }
}

pub mod text {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
        Some(text).filter(|text| !text.is_empty()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
        Ok(Option::<String>::deserialize(deserializer)?.unwrap_or_default())
    }
}

pub mod count {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(count: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        Some(count).filter(|count| **count > 0).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.unwrap_or_default())
    }
}
