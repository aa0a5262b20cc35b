//! `-h`: the options that most runs need, on one screen. `--help` has all of them.

use clap::CommandFactory;

use super::Cli;

/// Options of a run that `-h` shows, in order, in few words.
const OPTIONS: &[(&str, &str)] = &[
    ("model_id", "Hub id, folder, GGUF file or built-in model"),
    ("precision", "fp16, int8, nf4 (4bit), nf4-nodq or all"),
    ("device", "auto, cpu, cuda or cuda:N"),
    ("prompt", "Text to continue"),
    ("prompt_tokens", "Synthetic prompt tokens; a list makes cases"),
    ("max_new_tokens", "Tokens to generate; a list makes cases"),
    ("depth", "Tokens in the KV cache before; a list makes cases"),
    ("batch_size", "Sequences at a time; a list makes cases"),
    ("repeats", "Counted repeats"),
    ("quality", "Measure quality (KL, perplexity) as well"),
    ("baseline", "Records of an earlier run to compare with"),
    ("card", "Say which precisions fit a card of this size"),
    ("output", "Write a file: .json, .html, .md, .csv, ..."),
    ("wide", "Show every column of the table"),
    ("dry_run", "Say what would run and whether it fits"),
    ("quiet", "Show no progress"),
    ("help", "Print this; --help prints every option"),
];

/// Commands that `-h` shows.
const COMMANDS: &[(&str, &str)] = &[
    ("quality", "Measure quality without speed"),
    ("suite", "Run many models, precisions and lengths from a TOML file"),
    ("compare", "Compare two results and fail on a regression"),
    ("report", "Turn results into a page with charts or another format"),
    ("export", "Write a quantized checkpoint for transformers"),
    ("doctor", "Show what this machine has for measuring"),
];

/// Behind the options.
const MORE: &str = "\
Every option: quantbench --help, quantbench COMMAND --help. A page of each command: quantbench man COMMAND
Examples:
  quantbench -m microsoft/phi-2 --precision fp16,4bit -p 512 -n 128
  quantbench -m ./my-model --quality -o result.json -o result.html";

/// The same commands and options as [`Cli`], with most of them out of sight.
pub fn command() -> clap::Command {
    let brief = Cli::command().mut_subcommands(|command| {
        let shown = COMMANDS.iter().find(|(name, _)| *name == command.get_name());
        match (command.get_name(), shown) {
            ("run", _) => options(command).hide(true),
            (_, Some((_, about))) => command.about(*about),
            _ => command.hide(true),
        }
    });
    options(brief).disable_help_subcommand(true)
}

fn options(command: clap::Command) -> clap::Command {
    command.after_help(MORE).mut_args(|arg| {
        let found = OPTIONS.iter().position(|(id, _)| *id == arg.get_id().as_str());
        match found {
            Some(at) => {
                let takes_value = arg.get_action().takes_values();
                let arg = arg.help(OPTIONS[at].1).help_heading(None).display_order(at);
                if takes_value { arg.hide_default_value(true).hide_possible_values(true) } else { arg }
            }
            None => arg.hide(true),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fits_a_screen_and_names_options_that_are_there() {
        for command in [command(), command().find_subcommand("run").unwrap().clone()] {
            let text = command.clone().term_width(80).render_help().to_string();
            assert!(text.lines().count() <= 40 && text.lines().all(|line| line.chars().count() <= 80), "{text}");
            for (id, _) in OPTIONS.iter().filter(|(id, _)| *id != "help") {
                assert!(command.get_arguments().any(|arg| arg.get_id() == id), "no option `{id}`");
            }
        }
    }
}
