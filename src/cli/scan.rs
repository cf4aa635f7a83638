//! As much of the command line as must be read to know whose verb it is.
//!
//! runc's global flags come before the verb, in the manner of Go: one dash or two, the
//! value after `=` or in the next argument. Nothing is judged here: whatever looks wrong is
//! the runtime's to complain of. Arguments are bytes and need not be UTF-8.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::report::log::{ErrorLog, Format};

/// Our verbs. None of them is a verb of runc, crun or youki.
pub const OURS: [&str; 8] =
    ["migrate", "receive", "check", "migrations", "resolve", "completions", "__man", "__guard"];

/// The runtime's verbs that bring a container to life, which an away-mark forbids. To the runtime
/// one that is frozen for its hand-over is only paused.
const GUARDED: [&str; 5] = ["create", "start", "run", "restore", "resume"];

/// Our only global flag; it is taken out of what the runtime sees.
const FERRY_RUNTIME: &[u8] = b"ferry-runtime";

/// Global flags with a value, of runc, crun and youki.
const VALUED: [&str; 7] =
    ["log", "log-format", "log-level", "root", "criu", "rootless", "cgroup-manager"];

/// Global flags without one.
const SWITCHES: [&str; 2] = ["debug", "systemd-cgroup"];

/// Flags with a value of the guarded verbs, of runc, crun and youki.
const GUARDED_VALUED: [&str; 16] = [
    "b",
    "bundle",
    "config",
    "console-socket",
    "empty-ns",
    "image-path",
    "lsm-mount-context",
    "lsm-profile",
    "manage-cgroups-mode",
    "page-server",
    "parent-path",
    "status-fd",
    "pid-file",
    "pidfd-socket",
    "preserve-fds",
    "work-path",
];

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// A verb of ours, with the arguments in the form that [`crate::cli::args`] parses.
    Ours(Vec<OsString>),
    /// A verb that starts a container; each of these arguments may be its ID.
    Guarded(Vec<OsString>),
    /// A checkpoint, which an engine may be expected to ask for; each of these may be the ID.
    Checkpoint(Vec<OsString>),
    /// The runtime's version, to which we add ours.
    Version,
    /// The runtime's general help, to which we add our verbs.
    Help,
    /// Anything else.
    Runtime,
    /// `--ferry-runtime` with nothing after it.
    NoRuntimeGiven,
}

/// A command line, read up to the verb.
#[derive(Debug)]
pub struct Scan {
    /// What is asked for.
    pub command: Command,
    /// The verb, or what stands in its place.
    pub verb: Option<OsString>,
    /// The arguments for the runtime: all of them but ours.
    pub argv: Vec<OsString>,
    /// `--ferry-runtime`.
    pub ferry_runtime: Option<OsString>,
    /// `--root`.
    pub root: Option<PathBuf>,
    /// The configuration of which a container is to be made.
    pub creates: Option<PathBuf>,
    /// `--log` and `--log-format`.
    pub log: ErrorLog,
}

/// A flag taken apart: its name without dashes, and what follows `=`.
struct Flag<'a> {
    name: &'a [u8],
    value: Option<&'a OsStr>,
}

impl<'a> Flag<'a> {
    /// `None` for what Go's flag package takes as a positional argument.
    fn of(argument: &'a OsStr) -> Option<Self> {
        let bytes = argument.as_bytes();
        let body = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-"))?;
        if body.is_empty() {
            return None;
        }
        let (name, value) = match body.iter().position(|&b| b == b'=') {
            Some(at) => (&body[..at], Some(OsStr::from_bytes(&body[at + 1..]))),
            None => (body, None),
        };
        Some(Flag { name, value })
    }

    fn is_in(&self, names: &[&str]) -> bool {
        names.iter().any(|name| name.as_bytes() == self.name)
    }

    /// Tells whether a switch is on: its value is optional and in Go's spelling.
    fn is_on(&self) -> bool {
        let on = ["1", "t", "T", "true", "TRUE", "True"];
        self.value.is_none_or(|value| on.iter().any(|word| value == *word))
    }
}

impl Scan {
    /// Reads the arguments that follow argv[0].
    pub fn of(arguments: Vec<OsString>) -> Scan {
        let mut scan = Scan {
            command: Command::Runtime,
            argv: Vec::with_capacity(arguments.len()),
            verb: None,
            ferry_runtime: None,
            root: None,
            creates: None,
            log: ErrorLog::default(),
        };

        // The globals that our own verbs share with runc, in the one form that clap takes.
        let mut shared: Vec<OsString> = vec!["ferry".into()];
        let (mut help, mut version, mut unknown) = (false, false, false);
        let mut rest = arguments.into_iter().peekable();

        while let Some(argument) = rest.peek() {
            let Some(flag) = Flag::of(argument) else {
                if argument == "--" {
                    scan.argv.extend(rest.next());
                }
                break;
            };

            if flag.name == FERRY_RUNTIME {
                let given = flag.value.map(OsStr::to_owned);
                rest.next();
                match given.or_else(|| rest.next()) {
                    Some(runtime) => scan.ferry_runtime = Some(runtime),
                    None => scan.command = Command::NoRuntimeGiven,
                }
            } else if flag.is_in(&VALUED) {
                let name = flag.name.to_owned();
                let mut value = flag.value.map(OsStr::to_owned);
                scan.argv.extend(rest.next());
                if value.is_none() {
                    value = rest.next();
                    scan.argv.extend(value.clone());
                }

                if let Some(value) = value {
                    scan.keep(&name, value, &mut shared);
                }
            } else {
                if flag.is_in(&SWITCHES) && flag.is_on() {
                    shared.push(long(flag.name, None));
                } else if flag.is_in(&["help", "h"]) {
                    help = flag.is_on();
                } else if flag.is_in(&["version", "v"]) {
                    version = flag.is_on();
                } else if !flag.is_in(&SWITCHES) {
                    unknown = true;
                }
                scan.argv.extend(rest.next());
            }
        }

        let words: Vec<OsString> = rest.collect();
        if scan.command == Command::Runtime {
            scan.command = match (help, version) {
                // What follows a flag that we do not know may be its value.
                _ if unknown => after_unknown_flags(&words),
                (true, _) if !ours(words.first()) => Command::Help,
                (_, true) => Command::Version,
                _ => command(&words, help, shared),
            };
        }

        if matches!(scan.command, Command::Guarded(_)) {
            scan.creates = creates(&words);
        }
        scan.verb = words.first().cloned();
        scan.argv.extend(words);

        scan
    }

    fn keep(&mut self, name: &[u8], value: OsString, shared: &mut Vec<OsString>) {
        match name {
            b"root" => self.root = Some(value.clone().into()),
            b"log" => self.log.file = Some(value.clone().into()),
            b"log-format" => {
                self.log.format = if value == "json" { Format::Json } else { Format::Text };
            }
            // Of no meaning for our verbs.
            _ => return,
        }
        shared.push(long(name, Some(&value)));
    }
}

fn long(name: &[u8], value: Option<&OsStr>) -> OsString {
    let mut flag = [b"--", name].concat();
    if let Some(value) = value {
        flag.push(b'=');
        flag.extend(value.as_bytes());
    }
    OsString::from_vec(flag)
}

fn ours(word: Option<&OsString>) -> bool {
    word.is_some_and(|word| OURS.iter().any(|verb| word == verb))
}

fn command(words: &[OsString], help: bool, mut shared: Vec<OsString>) -> Command {
    let Some((verb, arguments)) = words.split_first() else { return Command::Help };
    if ours(Some(verb)) {
        shared.extend(words.iter().cloned());
        if help {
            shared.push("--help".into());
        }
        Command::Ours(shared)
    } else if verb == "help" || verb == "h" {
        match arguments.first() {
            None => Command::Help,
            Some(topic) if ours(Some(topic)) => {
                Command::Ours(vec!["ferry".into(), topic.clone(), "--help".into()])
            }
            Some(_) => Command::Runtime,
        }
    } else if GUARDED.iter().any(|guarded| verb == guarded) {
        Command::Guarded(positionals(arguments))
    } else if verb == "checkpoint" {
        Command::Checkpoint(positionals(arguments))
    } else {
        Command::Runtime
    }
}

/// A newer runtime may have global flags that we do not know. Its verb is then not certain,
/// but a container that left must stay refused: better to look at a word too many.
fn after_unknown_flags(words: &[OsString]) -> Command {
    match words.iter().position(|word| GUARDED.iter().any(|guarded| word == guarded)) {
        Some(at) => Command::Guarded(positionals(&words[at + 1..])),
        None => Command::Runtime,
    }
}

/// The configuration that `create` or `run` will read; relative to the working directory.
fn creates(words: &[OsString]) -> Option<PathBuf> {
    let at = words.iter().position(|word| GUARDED.iter().any(|guarded| word == guarded))?;
    if words[at] != "create" && words[at] != "run" {
        return None;
    }
    let value = |names: &[&str]| value(&words[at + 1..], names).map(PathBuf::from);
    let bundle = value(&["b", "bundle"]).unwrap_or_default();
    Some(bundle.join(value(&["config"]).unwrap_or_else(|| "config.json".into())))
}

/// The value of a flag of a guarded verb; of several the last one counts.
fn value(arguments: &[OsString], names: &[&str]) -> Option<OsString> {
    let mut found = None;
    let mut rest = arguments.iter().take_while(|argument| *argument != "--");
    while let Some(argument) = rest.next() {
        let Some(flag) = Flag::of(argument) else { continue };
        let given = match flag.value {
            Some(value) => Some(value.to_owned()),
            None if flag.is_in(&GUARDED_VALUED) => rest.next().cloned(),
            None => None,
        };
        if flag.is_in(names) {
            found = given.or(found);
        }
    }
    found
}

/// Returns what may be the ID among the arguments of a guarded verb: flags may stand behind it too.
fn positionals(arguments: &[OsString]) -> Vec<OsString> {
    let mut found = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match Flag::of(argument) {
            Some(flag) if flag.value.is_none() && flag.is_in(&GUARDED_VALUED) => {
                rest.next();
            }
            Some(_) => {}
            None if argument == "--" => {
                found.extend(rest.by_ref().cloned());
            }
            None => found.push(argument.clone()),
        }
    }
    found
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
