//! Shell completions and manual pages, made from the same definition that parses the arguments.

use std::io::Write;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::args::Cli;
use crate::report::exit::Failed;

/// Prints the completions for `shell`.
///
/// # Errors
/// When standard output cannot be written to.
pub fn completions(shell: Shell) -> Result<(), Failed> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ferry", &mut text);
    io::stdout().write_all(&text).context("cannot write the completions").map_err(Failed::from)
}

/// Writes ferry.1, and ferry-VERB.1 for each verb that is not hidden.
///
/// # Errors
/// When a file cannot be written.
pub fn pages(directory: &Path) -> Result<(), Failed> {
    let mut ferry = Cli::command();
    ferry.build();

    write(directory, &ferry).map_err(Failed::from)?;
    for verb in ferry.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        // As git does it: ferry-migrate(1) is `ferry migrate`.
        let name: &'static str = format!("ferry-{}", verb.get_name()).leak();
        write(directory, &verb.clone().name(name)).map_err(Failed::from)?;
    }
    Ok(())
}

fn write(directory: &Path, command: &Command) -> Result<()> {
    let path = directory.join(format!("{}.1", command.get_name()));
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone())
        .render(&mut text)
        .and_then(|()| fs::write(&path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_with_its_options() {
        let dir = tempfile::tempdir().unwrap();
        pages(dir.path()).map_err(|failed| failed.error).unwrap();

        let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page("ferry-migrate.1").contains("max\\-downtime"));
        assert!(page("ferry.1").contains("ferry\\-resolve(1)"));
        for verb in Cli::command().get_subcommands() {
            let there = dir.path().join(format!("ferry-{}.1", verb.get_name())).exists();
            assert_eq!(there, !verb.is_hide_set(), "{}", verb.get_name());
        }
    }

    #[test]
    fn completions_know_verbs_and_options() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ferry", &mut text);
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("migrate") && text.contains("max-downtime"), "{shell}");
        }
    }
}
