//! `quantbench man`: a page of quantbench and of each of its commands.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::cli::{Cli, ManArgs};
use crate::error::{BadInput, nearest};
use crate::{report, ui};

/// Prints one page, or writes all of them.
pub fn man(args: &ManArgs) -> Result<ExitCode> {
    let pages = pages()?;
    match (&args.output, &args.command) {
        (Some(folder), _) => write(&pages, folder)?,
        (None, command) => ui::print(&pages[of(&pages, command.as_deref())?].roff)?,
    }
    Ok(ExitCode::SUCCESS)
}

struct Page {
    /// `quantbench`, `quantbench-compare`.
    name: String,
    roff: String,
}

/// Pages of quantbench itself, then of each command that people type.
fn pages() -> Result<Vec<Page>> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let shown = |command: &Command| -> Vec<Command> {
        let of_people = |command: &&Command| !command.is_hide_set() && command.get_name() != "help";
        command.get_subcommands().filter(of_people).cloned().collect()
    };
    let with_parts = |command: Command| [vec![command.clone()], shown(&command)].concat();
    let commands: Vec<Command> = shown(&root).into_iter().flat_map(with_parts).collect();
    // Building names them as they are typed: `quantbench compare`, whose page is `quantbench-compare`.
    std::iter::once(root).chain(commands).map(page).collect()
}

fn page(command: Command) -> Result<Page> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let mut roff = Vec::new();
    Man::new(command).title(name.to_uppercase()).render(&mut roff)?;
    Ok(Page { name, roff: String::from_utf8(roff)? })
}

/// The page of a command, by its name.
fn of(pages: &[Page], command: Option<&str>) -> Result<usize, BadInput> {
    let Some(command) = command else { return Ok(0) };
    let wanted = format!("quantbench-{}", command.trim_start_matches("quantbench-"));
    let names = || pages.iter().filter_map(|page| page.name.strip_prefix("quantbench-"));
    pages.iter().position(|page| page.name == wanted || page.name == command).ok_or_else(|| {
        let error =
            BadInput::new(format!("no command `{command}`: known are {}", names().collect::<Vec<_>>().join(", ")));
        match nearest(command, names()) {
            Some(nearest) => error.hint(format!("the nearest is `quantbench man {nearest}`")),
            None => error,
        }
    })
}

fn write(pages: &[Page], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| BadInput::new(format!("`--output {}`: {error}", folder.display())))?;
    for page in pages {
        report::write_file(&folder.join(format!("{}.1", page.name)), &page.roff)?;
    }
    ui::print(&format!("wrote {} pages to `{}`\n", pages.len(), folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_that_another_one_names_is_there() {
        let pages = pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
        // roff has `quantbench\-compare(1)`.
        let named = pages.iter().map(|page| page.roff.as_str()).collect::<String>().replace('\\', "");
        let named: Vec<&str> = named.split_whitespace().filter_map(|word| word.strip_suffix("(1)")).collect();
        assert!(named.len() >= 10, "{named:?}");
        assert!(named.iter().all(|name| names.contains(name)), "{named:?} of {names:?}");
        assert!(pages.iter().all(|page| page.roff.starts_with(".ie") && page.roff.contains(".SH NAME")));
    }

    #[test]
    fn a_page_is_found_by_the_name_of_its_command() {
        let pages = pages().unwrap();
        assert_eq!(of(&pages, None).unwrap(), 0);
        for name in ["compare", "quantbench-compare"] {
            assert_eq!(pages[of(&pages, Some(name)).unwrap()].name, "quantbench-compare");
        }
        assert_eq!(
            of(&pages, Some("comapre")).unwrap_err().hint_text(),
            Some("the nearest is `quantbench man compare`")
        );
    }
}
