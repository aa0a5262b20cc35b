//! The sensitive parts of a model: its quality with one of them quantized and all others in fp16.

use super::precision;
use super::reference::ReferenceWorker;
use crate::engine::{Device, Engine};
use crate::events::{Event, Listener, Unit};
use crate::plan::Model;
use crate::quality::modules::{Group, LayerCost, groups, sensitive};
use crate::quality::summary::summarize;
use crate::quant::{self, FormatId, FormatOptions};
use crate::record::{self, Quality, Record};
use crate::weights::policy::{Formats, Selection};

/// Fills the `modules` of every record of a quantized precision that has a quality. A part that fails becomes a row without
/// numbers.
pub fn measure(reference: &mut ReferenceWorker, records: &mut [Record], events: &dyn Listener) {
    let model = reference.model;
    let mut groups = groups(&model.matrices);
    // Rows of a quantized table can be read by the CPU alone.
    groups.retain(|group| reference.assignment.device == Device::Cpu || group.name != "embeddings");
    for record in records.iter_mut().filter(|record| record.engine.name == Engine::Quantbench.name()) {
        let Some(precision) = FormatId::named(&record.precision).filter(|precision| *precision != quant::BASELINE)
        else {
            continue;
        };
        let Some(quality) = &mut record.quality else { continue };
        let (label, total) = (format!("quality of {precision} by module"), groups.len() as u64);
        events.on(Event::Begin { label, total, unit: Unit::Runs });
        for (group, done) in groups.iter().zip(1..) {
            quality.modules.push(cost(reference, model, precision, group));
            events.on(Event::Progress { done });
        }
        events.on(Event::End);
        quality.suggested_keep_fp16 = suggestion(quality, &groups);
    }
}

fn cost(reference: &mut ReferenceWorker, model: &Model, precision: FormatId, group: &Group) -> record::ModuleQuality {
    let scores =
        precision::score_own(reference, (Engine::Quantbench, precision), &Selection::Only(group.matrices.clone())).ok();
    let found = scores.as_ref().and_then(|scores| summarize(&scores.costs));
    record::ModuleQuality {
        module: group.name.clone(),
        saved_bytes: saved_bytes(model, precision, reference.case.format_options, group),
        kl_mean: found.map(|found| found.kl_mean),
        kl_mean_half_width: found.and_then(|found| found.kl_mean_half_width),
        top1_agreement: found.map(|found| found.top1_agreement),
        outlier_share: scores.and_then(|scores| scores.outlier_share()),
    }
}

/// Bytes of the group in fp16 over those at the precision.
fn saved_bytes(model: &Model, precision: FormatId, options: FormatOptions, group: &Group) -> u64 {
    let formats = Formats::new(precision, options);
    let saved = model.matrices.iter().filter(|spec| group.matrices.contains(&spec.name)).map(|spec| {
        let bytes = |format: &dyn crate::quant::Format| format.stored_bytes(spec.n, spec.k);
        bytes(formats.unquantized()).saturating_sub(bytes(formats.asked())) as u64
    });
    saved.sum()
}

fn suggestion(quality: &Quality, groups: &[Group]) -> Vec<String> {
    let layers = quality.modules.iter().zip(groups).filter(|(_, group)| group.is_layer);
    let layers: Vec<_> = layers
        .filter_map(|(module, _)| {
            let (name, saved_bytes) = (module.module.as_str(), module.saved_bytes);
            Some(LayerCost { name, kl_mean: module.kl_mean?, saved_bytes })
        })
        .collect();
    sensitive(&layers).into_iter().map(str::to_owned).collect()
}
