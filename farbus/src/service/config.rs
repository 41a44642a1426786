//! Options from the environment and from a file, for the commands that run as services; what the command line says goes before both.
//!
//! With `FARBUS_LEND_SPIN=1ms` and a file that says `[lend]` and `device = "nvme:disk.img"`, `farbus lend --listen shm:/run/x --config lend.toml` is
//! `farbus lend --spin=1ms --device=nvme:disk.img --listen shm:/run/x`: each option comes whole from the first that has it. A name that no option has is refused.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use farbus_control::read::read_text;
use thiserror::Error;

/// The commands that are services, as on the command line.
const SERVICES: [&str; 4] = ["lend", "borrow", "bank serve", "bank serve-faults"];

/// Why what the environment or a file says makes no sense.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// No option has that name.
    #[error("{place} has {key}, which `farbus {command}` does not know{}", nearest.as_ref().map_or(String::new(), |near| format!(": is it {near}?")))]
    Unknown { place: String, key: String, command: String, nearest: Option<String> },
    /// A value of a kind that no option has.
    #[error("{place}: {key} {wanted}")]
    Value { place: String, key: String, wanted: &'static str },
    /// The file cannot be read.
    #[error("cannot read {path}: {why}")]
    File { path: String, why: String },
    /// It is no TOML.
    #[error("{path} is no TOML: {why}")]
    Syntax { path: String, why: String },
}

/// A command line with what the environment and the file add to it.
#[derive(Debug, Default)]
pub struct Merged {
    /// All words.
    pub words: Vec<OsString>,
    /// Where each option comes from that the command line does not have.
    origins: BTreeMap<String, String>,
    command: String,
}

impl Merged {
    /// Adds to `words`, a command line of `all`, what `environment` and the file that it names say. Words of other commands stay as they are.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn of(words: Vec<OsString>, all: &Command, environment: &[(OsString, OsString)]) -> Result<Self, ConfigError> {
        let found = words.iter().enumerate().skip(1).filter(|(_, word)| !is_option(word));
        let mut found = found.map(|(at, word)| (at, word.to_string_lossy().into_owned()));
        let (first, second) = (found.next(), found.next());
        let service = SERVICES.iter().find_map(|service| match (service.split_once(' '), &first, &second) {
            (None, Some((at, word)), _) if word == service => Some((*service, *at)),
            (Some((outer, inner)), Some((_, first)), Some((at, second))) if first == outer && second == inner => {
                Some((*service, *at))
            }
            _ => None,
        });
        let Some((service, at)) = service else {
            return Ok(Self { words, ..Self::default() });
        };
        let Some(command) = service.split(' ').try_fold(all, |command, name| command.find_subcommand(name)) else {
            return Ok(Self { words, ..Self::default() });
        };
        let given = Given::of(words.get(at + 1..).unwrap_or_default(), command);
        let mut merged = Self { words, origins: BTreeMap::new(), command: service.to_owned() };
        let mut more = Vec::new();
        let named = merged.take_environment(command, &given, environment, &mut more)?;
        let file = given.config.clone().or_else(|| named.map(PathBuf::from));
        if let Some(path) = file {
            merged.take_file(command, &given, &path, &mut more)?;
        }
        merged.words.splice(at + 1..at + 1, more);
        Ok(merged)
    }

    /// Takes the variables of this command; the value of the one that names a file.
    fn take_environment(
        &mut self,
        command: &Command,
        given: &Given,
        environment: &[(OsString, OsString)],
        more: &mut Vec<OsString>,
    ) -> Result<Option<OsString>, ConfigError> {
        let prefix = prefix(&self.command);
        let others: Vec<_> = SERVICES.iter().map(|other| self::prefix(other)).filter(|other| other.len() > prefix.len()).collect();
        let mut config = None;
        for (name, value) in environment {
            let Some(name) = name.to_str().filter(|name| !others.iter().any(|other| name.starts_with(other))) else { continue };
            let Some(key) = name.strip_prefix(&prefix).map(|key| key.to_ascii_lowercase().replace('_', "-")) else { continue };
            let arg = option(command, &key).ok_or_else(|| ConfigError::Unknown {
                place: "the environment".to_owned(),
                key: name.to_owned(),
                command: self.command.clone(),
                nearest: nearest(command, &key).map(|near| format!("{prefix}{}", near.to_ascii_uppercase().replace('-', "_"))),
            })?;
            if key == "config" {
                config = Some(value.clone());
            }
            if given.has(&key) {
                continue;
            }
            self.origins.insert(key.clone(), name.to_owned());
            if takes_value(arg) {
                more.push(word(arg, &key, value));
            } else if is_on(value).ok_or_else(|| ConfigError::Value {
                place: "the environment".to_owned(),
                key: name.to_owned(),
                wanted: "is a switch: it takes true or false",
            })? {
                more.push(format!("--{key}").into());
            }
        }
        Ok(config)
    }

    fn take_file(
        &mut self,
        command: &Command,
        given: &Given,
        path: &std::path::Path,
        more: &mut Vec<OsString>,
    ) -> Result<(), ConfigError> {
        let place = path.display().to_string();
        let text = read_text(path).map_err(|error| ConfigError::File { path: place.clone(), why: error.to_string() })?;
        let root = text
            .parse::<toml::Table>()
            .map_err(|error| ConfigError::Syntax { path: place.clone(), why: error.to_string().replace('\n', " ") })?;
        check_tables(&root, &place)?;
        let tables = self.command.split(' ');
        let mut table = Some(&root);
        for name in tables {
            table = table.and_then(|table| table.get(name)).and_then(toml::Value::as_table);
        }
        for (key, value) in table.into_iter().flatten() {
            if key == "config" || key == "print-config" {
                let wanted = "is for the command line";
                return Err(ConfigError::Value { place, key: key.clone(), wanted });
            }
            let arg = option(command, key).ok_or_else(|| ConfigError::Unknown {
                place: place.clone(),
                key: key.clone(),
                command: self.command.clone(),
                nearest: nearest(command, key),
            })?;
            if given.has(key) || self.origins.contains_key(key) {
                continue;
            }
            self.origins.insert(key.clone(), place.clone());
            let wrong = |wanted| ConfigError::Value { place: place.clone(), key: key.clone(), wanted };
            match value {
                toml::Value::Boolean(on) if !takes_value(arg) => more.extend(on.then(|| OsString::from(format!("--{key}")))),
                _ if !takes_value(arg) => return Err(wrong("is a switch: it takes true or false")),
                toml::Value::Array(values) if matches!(arg.get_action(), ArgAction::Append) => {
                    for value in values {
                        let text = plain(value).ok_or_else(|| wrong("takes texts and numbers"))?;
                        more.push(word(arg, key, OsStr::new(&text)));
                    }
                }
                toml::Value::Array(_) => return Err(wrong("takes one value")),
                value => {
                    let text = plain(value).ok_or_else(|| wrong("takes a text or a number"))?;
                    more.push(word(arg, key, OsStr::new(&text)));
                }
            }
        }
        Ok(())
    }

    /// What is in force, as a file that says the same.
    pub fn print(&self, command: &Command, matches: &ArgMatches) -> String {
        let mut lines =
            vec![format!("# farbus {}: what is in force", self.command), format!("[{}]", self.command.replace(' ', "."))];
        for (key, arg) in options(command) {
            if ["config", "print-config", "help", "version", "verbose"].contains(&key.as_str()) {
                continue;
            }
            let id = arg.get_id().as_str();
            let from = match (self.origins.get(&key), matches.value_source(id)) {
                (Some(origin), _) => origin.clone(),
                (None, Some(ValueSource::CommandLine)) => "the command line".to_owned(),
                (None, _) => "default".to_owned(),
            };
            let value = if takes_value(arg) {
                let values: Vec<_> = matches.get_raw(id).into_iter().flatten().map(quoted).collect();
                match (values.as_slice(), arg.get_action()) {
                    ([], _) => continue,
                    (values, ArgAction::Append) => format!("[{}]", values.join(", ")),
                    ([value, ..], _) => value.clone(),
                }
            } else {
                matches.get_flag(id).to_string()
            };
            lines.push(format!("{key} = {value}  # {from}"));
        }
        lines.join("\n")
    }
}

/// What the command line has of a service's options.
struct Given {
    keys: Vec<String>,
    config: Option<PathBuf>,
}

impl Given {
    fn of(words: &[OsString], command: &Command) -> Self {
        let mut given = Self { keys: Vec::new(), config: None };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let text = word.to_string_lossy();
            let Some(name) = text.strip_prefix("--").filter(|name| !name.is_empty()) else {
                if !text.starts_with('-') {
                    // The only one that is no option.
                    given.keys.extend(options(command).find(|(_, arg)| arg.is_positional()).map(|(key, _)| key));
                }
                continue;
            };
            let (name, value) = name.split_once('=').map_or((name, None), |(name, value)| (name, Some(OsString::from(value))));
            let takes = option(command, name).is_some_and(takes_value);
            let value = if takes { value.or_else(|| words.next().cloned()) } else { None };
            if name == "config" {
                given.config = value.map(PathBuf::from);
            }
            given.keys.push(name.to_owned());
        }
        given
    }

    fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|known| known == key)
    }
}

/// `FARBUS_BANK_SERVE_`.
fn prefix(service: &str) -> String {
    format!("FARBUS_{}_", service.to_ascii_uppercase().replace([' ', '-'], "_"))
}

/// The names that options have in a file; of what is no option, the name in the help.
fn options(command: &Command) -> impl Iterator<Item = (String, &Arg)> {
    command.get_arguments().map(|arg| (arg.get_long().map_or_else(|| arg.get_id().as_str().replace('_', "-"), str::to_owned), arg))
}

fn option<'c>(command: &'c Command, key: &str) -> Option<&'c Arg> {
    options(command).find(|(known, _)| known == key).map(|(_, arg)| arg)
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

fn word(arg: &Arg, key: &str, value: &OsStr) -> OsString {
    if arg.is_positional() {
        return value.to_owned();
    }
    let mut word = OsString::from(format!("--{key}="));
    word.push(value);
    word
}

fn is_option(word: &OsStr) -> bool {
    word.as_encoded_bytes().first() == Some(&b'-')
}

fn is_on(value: &OsStr) -> Option<bool> {
    match value.to_str()? {
        "true" | "1" | "yes" => Some(true),
        "false" | "0" | "no" | "" => Some(false),
        _ => None,
    }
}

fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A text as TOML writes it: JSON's escapes are among TOML's.
fn quoted(value: &OsStr) -> String {
    serde_json::Value::from(value.to_string_lossy().into_owned()).to_string()
}

/// Refuses tables that are of no service.
fn check_tables(root: &toml::Table, place: &str) -> Result<(), ConfigError> {
    let unknown = |key: String, names: &[&str]| ConfigError::Unknown {
        place: place.to_owned(),
        nearest: closest(&key, names.iter().copied()),
        key: format!("the table [{key}]"),
        command: "any service".to_owned(),
    };
    for (name, value) in root {
        match (name.as_str(), value) {
            ("lend" | "borrow", toml::Value::Table(_)) => {}
            ("bank", toml::Value::Table(inner)) => {
                for (inner, value) in inner {
                    if !["serve", "serve-faults"].contains(&inner.as_str()) || !value.is_table() {
                        return Err(unknown(format!("bank.{inner}"), &["bank.serve", "bank.serve-faults"]));
                    }
                }
            }
            (name, toml::Value::Table(_)) => return Err(unknown(name.to_owned(), &["lend", "borrow", "bank"])),
            (key, _) => {
                let wanted = "is in no table: begin with [lend], [borrow], [bank.serve] or [bank.serve-faults]";
                return Err(ConfigError::Value { place: place.to_owned(), key: key.to_owned(), wanted });
            }
        }
    }
    Ok(())
}

fn nearest(command: &Command, key: &str) -> Option<String> {
    let names: Vec<_> = options(command).map(|(name, _)| name).collect();
    closest(key, names.iter().map(String::as_str))
}

/// The name that looks most like `key`, if any does.
fn closest<'n>(key: &str, names: impl Iterator<Item = &'n str>) -> Option<String> {
    let scored = names.map(|name| (strsim::jaro_winkler(key, name), name)).filter(|(score, _)| *score > 0.7);
    scored.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::cli::{Cli, Command as Wanted};

    fn all() -> Command {
        let mut command = Cli::command();
        command.build();
        command
    }

    fn merge(words: &str, environment: &[(&str, &str)], file: &str) -> Result<(Merged, tempfile::TempDir), ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("farbus.toml");
        std::fs::write(&path, file).unwrap();
        let words = words.replace("FILE", &path.display().to_string());
        let environment: Vec<_> = environment
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value.replace("FILE", &path.display().to_string()))))
            .collect();
        Merged::of(words.split(' ').map(OsString::from).collect(), &all(), &environment).map(|merged| (merged, folder))
    }

    fn lend(merged: &Merged) -> crate::cli::LendArgs {
        let matches = all().try_get_matches_from(&merged.words).unwrap_or_else(|error| panic!("{:?}: {error}", merged.words));
        match Cli::from_arg_matches(&matches).unwrap().command {
            Wanted::Lend(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    const FILE: &str = "[lend]\ndevice = \"edu\"\nlisten = \"shm:/run/file\"\nspin = \"1ms\"\nonce = true\nallow = [\"a\", \"b\"]\n[borrow]\nfrom = \"shm:/x\"\n";

    #[test]
    fn flags_go_before_the_environment_and_the_environment_before_the_file() {
        let environment = [
            ("FARBUS_LEND_LISTEN", "shm:/run/env"),
            ("FARBUS_LEND_SPIN", "2ms"),
            ("FARBUS_BORROW_SPIN", "7ms"),
            ("FARBUS_BIN", "x"),
        ];
        let (merged, _kept) = merge("farbus -v lend --config FILE --spin 3ms", &environment, FILE).unwrap();
        let args = lend(&merged);
        assert_eq!(args.spin, std::time::Duration::from_millis(3));
        assert_eq!(args.listen.to_string(), "shm:/run/env");
        assert!(args.once && args.allow.allow == ["a", "b"]);

        // A list is not added to but replaced, a switch can be put off, and the file can be named by the environment.
        let environment = [("FARBUS_LEND_CONFIG", "FILE"), ("FARBUS_LEND_ONCE", "false")];
        let (merged, _kept) = merge("farbus lend --allow=c", &environment, FILE).unwrap();
        let args = lend(&merged);
        assert!(!args.once && args.allow.allow == ["c"]);
    }

    #[test]
    fn what_is_in_force_is_printed_as_a_file_that_says_the_same() {
        let environment = [("FARBUS_LEND_SPIN", "2ms")];
        let (merged, folder) = merge("farbus lend --config FILE --listen shm:/run/x", &environment, FILE).unwrap();
        let printed = |merged: &Merged| {
            let matches = all().try_get_matches_from(&merged.words).unwrap();
            let (_, matches) = matches.subcommand().unwrap();
            merged.print(all().find_subcommand("lend").unwrap(), matches)
        };
        let text = printed(&merged);
        let file = folder.path().join("farbus.toml").display().to_string();
        for line in [
            "[lend]".to_owned(),
            format!("device = \"edu\"  # {file}"),
            "listen = \"shm:/run/x\"  # the command line".to_owned(),
            "spin = \"2ms\"  # FARBUS_LEND_SPIN".to_owned(),
            "plain = false  # default".to_owned(),
            format!("allow = [\"a\", \"b\"]  # {file}"),
        ] {
            assert!(text.lines().any(|said| said == line), "{line} is not in\n{text}");
        }
        let (again, _kept) = merge("farbus lend --config FILE", &[], &text).unwrap();
        let without_origin = |text: &str| text.lines().map(|line| line.split("  #").next().unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(without_origin(&printed(&again)), without_origin(&text));
    }

    #[test]
    fn a_bank_that_is_named_in_a_file_is_no_option() {
        let file = "[bank.serve]\nbank = \"/srv/bank\"\nlisten = \"shm:/run/bank\"\nread = [\"web-*=uid:7\"]\n";
        let (merged, _kept) = merge("farbus bank serve --config FILE", &[("FARBUS_BANK_SERVE_FAULTS_SOCKET", "/x")], file).unwrap();
        assert!(all().try_get_matches_from(&merged.words).is_ok(), "{:?}", merged.words);
        let (merged, _kept) = merge("farbus bank serve /other --config FILE", &[], file).unwrap();
        assert!(!merged.words.contains(&"/srv/bank".into()), "{:?}", merged.words);
    }

    #[test]
    fn what_nobody_knows_is_refused_with_what_was_perhaps_meant() {
        for (environment, file, words) in [
            (&[("FARBUS_LEND_LISTN", "x")][..], "", &["FARBUS_LEND_LISTN", "is it FARBUS_LEND_LISTEN?"][..]),
            (&[("FARBUS_LEND_ONCE", "maybe")], "", &["FARBUS_LEND_ONCE", "true or false"]),
            (&[], "[lend]\ndevise = \"edu\"", &["devise", "is it device?"]),
            (&[], "[lent]\ndevice = \"edu\"", &["[lent]", "is it lend?"]),
            (&[], "[bank.server]\n", &["[bank.server]", "is it bank.serve?"]),
            (&[], "device = \"edu\"", &["device", "is in no table"]),
            (&[], "[lend]\nonce = \"yes\"", &["once", "true or false"]),
            (&[], "[lend]\nspin = [\"1ms\", \"2ms\"]", &["spin", "one value"]),
            (&[], "[lend]\nspin = { a = 1 }", &["spin", "a text or a number"]),
            (&[], "[lend]\nconfig = \"x\"", &["config", "command line"]),
            (&[], "[lend\n", &["no TOML"]),
        ] {
            let error =
                merge("farbus lend --config FILE", environment, file).map(|(merged, _)| merged.words).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{file}{environment:?}: {error}");
        }
        let missing = Merged::of(["farbus", "lend", "--config=/nowhere/x"].map(OsString::from).to_vec(), &all(), &[]);
        assert!(missing.unwrap_err().to_string().contains("/nowhere/x"));
        // Other commands have nothing of it.
        assert_eq!(merge("farbus devices --json", &[("FARBUS_LEND_X", "1")], "").unwrap().0.words.len(), 3);
    }
}
