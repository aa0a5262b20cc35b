//! `quantbench completions`: what a shell offers.

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::{ui, weights};

/// Prints the script of a shell.
pub fn completions(shell: Shell) -> Result<ExitCode> {
    ui::print(&script(shell)?)?;
    Ok(ExitCode::SUCCESS)
}

fn script(shell: Shell) -> Result<String> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "quantbench", &mut script);
    let script = String::from_utf8(script)?;
    Ok(match shell {
        Shell::Zsh => folders_too_in_zsh(&script),
        Shell::Fish => folders_too_in_fish(&script),
        // bash offers files where none of the names begins with what was typed.
        _ => script,
    })
}

/// A model is a built-in name or a folder: zsh offers names alone where there is a list of them.
fn folders_too_in_zsh(script: &str) -> String {
    let names: Vec<&str> = weights::builtin_models().iter().map(|model| model.name).collect();
    let names = names.join(" ");
    script.replace(&format!(":({names})"), &format!(":{{compadd {names}; _files -/}}"))
}

/// The same for fish, where `-f` means no files.
fn folders_too_in_fish(script: &str) -> String {
    let with_files = |line: &str| match line.contains("-l model-id ") {
        true => line.replacen(" -r -f -a", " -r -F -a", 1),
        false => line.to_owned(),
    };
    script.lines().map(|line| with_files(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_precisions_and_models_are_offered_and_folders_too() {
        for (shell, words) in [
            (Shell::Bash, &["cuda:0", "nf4-nodq", "llama-3.2-1b", "llama-bench"][..]),
            (Shell::Zsh, &["cuda\\:0", "nf4-nodq", "compadd smollm2-135m", "; _files -/}", "llama-bench"]),
            (Shell::Fish, &["cuda:0", "nf4-nodq", "llama-3.2-1b", " -r -F -a", "llama-bench"]),
        ] {
            let script = script(shell).unwrap();
            for word in words {
                assert!(script.contains(word), "{shell} does not offer `{word}`");
            }
        }
    }
}
