#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use quantbench::cli::Cli;
use quantbench::{commands, error, ui};

fn main() -> ExitCode {
    match commands::dispatch(&Cli::read(std::env::args_os())) {
        Ok(code) => code,
        Err(failure) => {
            ui::print_error(&failure);
            ExitCode::from(error::EXIT_CODE)
        }
    }
}
