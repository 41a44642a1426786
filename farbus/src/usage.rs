//! Arguments that cannot be understood: said to people on standard error, and with `--json` to machines on standard output.
//!
//! `farbus lend --json --listen shm:/tmp/link` prints `{"event":"error","error":"the following required arguments were not provided: --device <SPEC>",…}`
//! and exits with status 2.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use serde_json::{Value, json};

use crate::cli::{Cli, Json};
use crate::output::{Events, print_line};
use crate::service::config::Merged;

/// The exit status where the arguments make no sense.
pub const MISUSE: u8 = 2;

/// The arguments of this process; where they are none, or only ask for help, all is said and the exit status is left.
pub fn parse() -> Result<Cli, ExitCode> {
    let words: Vec<_> = std::env::args_os().collect();
    let mut all = Cli::command();
    all.build();
    let merged = Merged::of(words.clone(), &all, &std::env::vars_os().collect::<Vec<_>>())
        .map_err(|error| misunderstood(&words, &Cli::command().error(ErrorKind::ValueValidation, error)))?;
    let matches = Cli::command().try_get_matches_from(&merged.words).map_err(|error| misunderstood(&words, &error))?;
    if let Some((command, matches)) = asked_to_print(&all, &matches) {
        print_line(&merged.print(command, matches));
        return Err(ExitCode::SUCCESS);
    }
    Cli::from_arg_matches(&matches).map_err(|error| misunderstood(&words, &error))
}

/// The service that is asked for what is in force, and its arguments.
fn asked_to_print<'c, 'm>(all: &'c clap::Command, matches: &'m ArgMatches) -> Option<(&'c clap::Command, &'m ArgMatches)> {
    let (mut command, mut matches) = (all, matches);
    while let Some((name, inner)) = matches.subcommand() {
        (command, matches) = (command.find_subcommand(name)?, inner);
    }
    matches!(matches.try_get_one::<bool>("print_config"), Ok(Some(true))).then_some((command, matches))
}

/// Says why, in both ways.
fn misunderstood(words: &[OsString], error: &clap::Error) -> ExitCode {
    // Where nobody reads, nobody is told.
    let _said = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let command = command(words);
    match shape(words, command.as_deref()) {
        Json::No => {}
        Json::Events => Events::new(true).say("error", fields(error, command.as_deref()), ""),
        Json::Object => print_line(&fields(error, command.as_deref()).to_string()),
    }
    ExitCode::from(MISUSE)
}

/// The command that is asked for, where there is one of that name: `lend`, `bank deposit`.
fn command(words: &[OsString]) -> Option<String> {
    let mut next = words.iter().skip(1).map(|word| word.to_string_lossy()).filter(|word| !word.starts_with('-'));
    let all = Cli::command();
    let first = all.find_subcommand(&*next.next()?)?;
    let second = next.next().and_then(|word| first.find_subcommand(&*word));
    Some(second.map_or_else(|| first.get_name().to_owned(), |second| format!("{} {}", first.get_name(), second.get_name())))
}

/// As [`crate::cli::Command::json`] says it of arguments that are right.
fn shape(words: &[OsString], command: Option<&str>) -> Json {
    let wanted = words.iter().take_while(|word| *word != "--").any(|word| word == "--json");
    match command {
        _ if !wanted => Json::No,
        Some("lend" | "borrow" | "bank serve" | "bank serve-faults") => Json::Events,

        _ => Json::Object,
    }
}

/// The same as [`crate::failure::fields`] gives of what fails later.
fn fields(error: &clap::Error, command: Option<&str>) -> Value {
    let text = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "error: a command is missing".to_owned(),
        _ => error.to_string(),
    };
    let what = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
    let what: Vec<_> = what.split_whitespace().collect();
    let help = command.map_or_else(|| "farbus --help".to_owned(), |command| format!("farbus {command} --help"));
    json!({ "error": what.join(" "), "causes": [], "hint": format!("`{help}` says what it takes") })
}
