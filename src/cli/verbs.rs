//! Our verbs, from their arguments to the migration and back to an exit code.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use serde_json::json;

use super::args::{
    CheckArgs, Globals, MigrateArgs, MigrationsArgs, Network, ReceiveArgs, RemoteArgs, SourceFiles,
};
use super::destination::{Destination, Listen};
use super::runtime::{Config, Runtime as Found};
use crate::migration::journal::{Journal, Role, State};
use crate::migration::options::Wishes;
use crate::migration::preflight::{host, inspect};
use crate::migration::recovery::{guards, successors, word};
use crate::migration::source;
use crate::migration::source::ask::{self, Options};
use crate::migration::transfer::carry;
use crate::migration::{destination, forwarding as forward};
use crate::network;
use crate::oci::runtime::Runtime;
use crate::problem::{Problem, advice};
use crate::report::exit::{Failed, Told};
use crate::report::forecast::Forecast;
use crate::report::log::{self, rfc3339};
use crate::report::progress::Reporter;
use crate::report::shown::{self, shown};
use crate::sys::process;
use crate::transport::connect::{self, Destination as Reach, split_command};

pub(super) fn runtime(globals: &Globals) -> Result<Runtime, Failed> {
    let found =
        Found::find(globals.ferry_runtime.as_deref()).map_err(|u| Failed::refused(u.error))?;
    tracing::debug!("the runtime is {}", found.path.display());
    Ok(Runtime::new(found.path, globals.root.clone(), globals.systemd_cgroup))
}

pub(super) fn state_dir() -> Result<std::path::PathBuf, Failed> {
    Ok(Config::load().map_err(Failed::refused)?.state_dir())
}

fn reach(destination: &Destination, remote: &RemoteArgs) -> Result<Reach, Failed> {
    Ok(match destination {
        Destination::Unix(path) => Reach::Unix(path.clone()),
        Destination::Ssh { user, host, port } => Reach::Shell {
            host: user.as_ref().map_or_else(|| host.clone(), |u| format!("{u}@{host}")),
            port: *port,
            rsh: split_command(remote.rsh.as_deref().unwrap_or("ssh")).map_err(Failed::usage)?,
            remote_ferry: match &remote.remote_ferry {
                None => "ferry".into(),
                Some(path) => path
                    .to_str()
                    .ok_or_else(|| Failed::usage(anyhow!("--remote-ferry must be UTF-8")))?
                    .to_owned(),
            },
        },
    })
}

fn placement(network: &Network) -> String {
    match network {
        Network::Auto => "auto".into(),
        Network::Keep => "keep".into(),
        Network::None => "none".into(),
        Network::Bridge(name) => format!("bridge={name}"),
        Network::Macvlan(name) => format!("macvlan={name}"),
        Network::Hook(program) => format!("hook={program}"),
    }
}

/// The bundle's place over there must not depend on where we stand.
fn absolute(path: Option<&Path>) -> Result<Option<std::path::PathBuf>, Failed> {
    path.map(std::path::absolute).transpose().map_err(|e| Failed::usage(e.into()))
}

/// `ferry migrate`.
pub fn migrate(globals: &Globals, args: &MigrateArgs) -> Result<(), Failed> {
    if args.die_with_parent {
        process::die_with_parent().map_err(|e| Failed::refused(e.into()))?;
    }
    let runtime = runtime(globals)?;
    let options = Options {
        wishes: Wishes {
            container: args.container.clone(),
            bundle: absolute(args.bundle.as_deref())?,
            placement: placement(&args.network),
            move_address: args.move_address.clone(),
            forward: args.forward.wish(),
            console_socket: absolute(args.console_socket.as_deref())?,
            root: globals.root.clone(),
            systemd_cgroup: globals.systemd_cgroup,
            verify: args.memory.verify,
            check_only: args.dry_run,
            rootfs: args.files.rootfs.wish(),
            volumes: args.files.volumes(),
            state_dir: Some(state_dir()?),
        },
        destination: reach(&args.destination, &args.remote)?,
        memory: args.memory.wishes(),
        timeout: args.timeout,
        leave_mark: args.mark(),
        remove_files: args.source_files == SourceFiles::Remove,
    };
    let mut reporter = Reporter::new(args.json);
    let result = if args.dry_run {
        source::check(&runtime, &options, true, &mut reporter)
    } else {
        source::migrate(&runtime, &state_dir()?, &options, &mut reporter)
    };
    let word = match &result {
        Ok(()) if args.dry_run => "checked",
        Ok(()) => "migrated",
        Err(failed) => failed.exit.word(),
    };
    reporter.report.error = result.as_ref().err().map(|f| format!("{:#}", f.error));
    let written = reporter.finish(word, args.report.as_deref());
    result?;
    if args.dry_run && !args.json {
        for line in reporter.report.forecast.iter().flat_map(Forecast::lines) {
            say(&line);
        }
        say(&format!("{} can go to {}", args.container, options.destination));
    }
    // It runs there: a report that cannot be written does not change that, but must be known.
    if let Err(e) = written {
        reporter.warning(&format!("{e:#}"));
    }
    Ok(())
}

/// `ferry receive`.
pub fn receive(globals: &Globals, args: &ReceiveArgs) -> Result<(), Failed> {
    match &args.listen {
        None => {
            let runtime = runtime(globals)?;
            let link = connect::stdio().map_err(Failed::refused)?;
            destination::receive(link, &runtime, &state_dir()?).map_err(|e| {
                Failed::from(match e.downcast::<Told>() {
                    Ok(told) if args.own_stderr => told.0,
                    Ok(told) => told.into(),
                    Err(e) => e,
                })
            })
        }
        Some(Listen::Unix(path)) => listen(globals, path).map_err(Failed::from),
    }
}

/// Every connection gets a process of its own, as inetd does it: one that dies takes no other
/// migration along.
fn listen(globals: &Globals, path: &Path) -> Result<()> {
    let what = || format!("cannot listen on unix:{}", path.display());
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        // A socket that nobody listens on is left over from a process that has died.
        match std::fs::symlink_metadata(path) {
            Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
                std::fs::remove_file(path).with_context(what)?;
            }
            _ => {}
        }
    }
    let listener = UnixListener::bind(path).with_context(what)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    tracing::info!("listening on unix:{}", path.display());
    for socket in listener.incoming() {
        let socket = socket?;
        let (input, output) = (OwnedFd::from(socket.try_clone()?), OwnedFd::from(socket));
        let mut command = Command::new("/proc/self/exe");
        if let Some(runtime) = &globals.ferry_runtime {
            command.arg("--ferry-runtime").arg(runtime);
        }
        if let Some(log) = &globals.log {
            command.arg("--log").arg(log).args(["--log-format", globals.log_format.name()]);
        }
        if globals.debug {
            command.arg("--debug");
        }
        command.args(["receive", "--stdio", "--own-stderr"]).stdin(input).stdout(output);
        let mut child = command.spawn().context("cannot start a receiver")?;
        tracing::info!("process {} takes a connection", child.id());
        std::thread::spawn(move || child.wait());
    }
    Ok(())
}

/// `ferry check`.
pub fn check(globals: &Globals, args: &CheckArgs) -> Result<(), Failed> {
    let mut problems = host::problems();
    let fit = !problems.iter().any(|p| p.fatal);
    let (result, conclusion) = match &args.container {
        None if fit => (Ok(()), check_host(globals, &mut problems)),
        Some(container) if fit => check_container(globals, args, container, &mut problems)?,
        _ => (Ok(()), String::new()),
    };
    tell_check(&problems, result, &conclusion, args.json)
}

/// Whether this host can send and receive; what is fine about it.
fn check_host(globals: &Globals, problems: &mut Vec<Problem>) -> String {
    problems.extend(host::receiving_problems(false));
    // Containers without an address can come all the same.
    problems.extend(network::usable::missing().into_iter().map(|problem| {
        let what = format!(
            "{}: no container with an address can come: {}",
            crate::sys::host::name(),
            problem.what
        );
        Problem { what, ..problem }.warning()
    }));
    let name = runtime(globals).map_err(|f| f.error).and_then(|r| r.version());
    let name = name.unwrap_or_else(|e| {
        let what = format!("{}: the runtime does not work", crate::sys::host::name());
        let hint = "install runc, or name another with --ferry-runtime or in Ferry's configuration";
        problems.push(Problem::new(what, format!("{e:#}")).hint(hint));
        String::new()
    });
    let criu = host::criu().map_or(0, |c| c.1);
    format!(
        "{} can send and receive containers: Linux {}, CRIU {}, {}",
        crate::sys::host::name(),
        host::kernel(),
        host::criu_words(criu),
        name.replace(" version ", " ")
    )
}

/// What stands in a container's way, here or on its way to the destination; else the conclusion.
fn check_container(
    globals: &Globals,
    args: &CheckArgs,
    container: &str,
    problems: &mut Vec<Problem>,
) -> Result<(Result<(), Failed>, String), Failed> {
    let runtime = runtime(globals)?;
    let wishes = Wishes {
        container: container.to_owned(),
        bundle: absolute(args.bundle.as_deref())?,
        placement: placement(&args.network),
        move_address: args.move_address.clone(),
        forward: args.forward.wish(),
        console_socket: None,
        root: globals.root.clone(),
        systemd_cgroup: globals.systemd_cgroup,
        verify: false,
        check_only: true,
        rootfs: args.files.rootfs.wish(),
        volumes: args.files.volumes(),
        state_dir: Some(state_dir()?),
    };
    let Some(destination) = &args.destination else {
        let looked = inspect::inspect(&runtime, &wishes);
        problems.extend(looked.map_or_else(|problems| problems, |subject| subject.warnings));
        let said =
            format!("{container} can go, to a host that is fit for it: name one to check it");
        return Ok((Ok(()), said));
    };
    let options = Options {
        wishes,
        destination: reach(destination, &args.remote)?,
        memory: carry::Wishes::default(),
        timeout: args.timeout,
        leave_mark: false,
        remove_files: false,
    };
    let mut reporter = Reporter::quiet();
    let result = source::check(&runtime, &options, false, &mut reporter);
    problems.append(&mut reporter.warnings);
    Ok((result, format!("{container} can go to {}", options.destination)))
}

fn tell_check(
    problems: &[Problem],
    result: Result<(), Failed>,
    conclusion: &str,
    as_json: bool,
) -> Result<(), Failed> {
    let fatal: Vec<Problem> = problems.iter().filter(|p| p.fatal).cloned().collect();
    let warnings: Vec<&Problem> = problems.iter().filter(|p| !p.fatal).collect();
    let result = if fatal.is_empty() { result } else { Err(ask::refusal(&fatal)) };
    if as_json {
        let mut all: Vec<_> = problems.iter().map(|p| json!(p)).collect();
        if let (Err(failed), true) = (&result, fatal.is_empty()) {
            all.push(json!({"what": format!("{:#}", failed.error), "fatal": true}));
        }
        let word = result.as_ref().map_or_else(|f| f.exit.word(), |()| "checked");
        let ok = result.is_ok();
        say_json(&json!({"event": "check", "result": word, "ok": ok, "problems": all}));
    } else {
        for warning in warnings {
            log::warn(&warning.to_string(), [warning.hint.as_str()]);
        }
        if result.is_ok() {
            say(conclusion);
        }
    }
    result
}

/// A line on standard output; a reader that went away is no error.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{}", shown(line));
}

/// An event on standard output.
pub(super) fn say_json(value: &serde_json::Value) {
    let _ = writeln!(std::io::stdout(), "{}", shown::json(value));
}

/// `ferry migrations`.
pub fn migrations(args: &MigrationsArgs) -> Result<(), Failed> {
    let state_dir = state_dir()?;
    let mut any = false;
    let (all, unreadable) = Journal::all(&state_dir)?;
    for journal in all {
        let record = &journal.record;
        if args.id.as_ref().is_some_and(|id| *id != record.container && *id != record.migration) {
            continue;
        }
        any = true;
        let under_way = record.worker_lives() && !journal.state().is_over();
        let in_words = standing_here(&journal, under_way);
        let ended = journal.states().last().filter(|s| s.0.is_over()).map(|s| s.1);
        if args.json {
            say_json(&json!({
                "migration": record.migration,
                "container": record.container,
                "role": record.role,
                "peer": record.peer,
                "state": journal.state(),
                "under_way": under_way,
                "begun": record.begun,
                "ended": ended,
                "states": journal.states(),
                "forward": forward::describe(record).map(|d| d.1),
            }));
        } else {
            let way = match record.role {
                Role::Source => "to",
                Role::Destination => "from",
            };
            say(&format!(
                "{}  {} - {:<20}  {}  {way} {}  {in_words}",
                record.migration,
                moment(record.begun),
                ended.map_or_else(String::new, moment),
                record.container,
                record.peer
            ));
            if let Some((words, _)) = forward::describe(record) {
                say(&format!("    {words}"));
            }
        }
    }
    let mut unreadable = unreadable.into_iter();
    if let Some(journal) = unreadable.find(|j| args.id.as_ref().is_none_or(|id| j.may_be_about(id)))
    {
        return Err(Failed::from(journal.error()));
    }
    match &args.id {
        Some(id) if !any => Err(Failed::from(advice(
            format!(
                "this host knows of no migration of a container {id}, and of none with that ID"
            ),
            format!("`ferry migrations` lists all that it has seen, in {}", state_dir.display()),
        ))),
        _ => Ok(()),
    }
}

fn moment(unix: u64) -> String {
    rfc3339(std::time::UNIX_EPOCH + std::time::Duration::from_secs(unix))
}

fn standing_here(journal: &Journal, under_way: bool) -> &'static str {
    match (journal.record.role, journal.state(), under_way) {
        (_, State::Aborted, _) => "given up: it stayed where it was",
        (Role::Destination, State::Ready, true) => "held here: waits for the verdict",
        (Role::Source, State::Finished, _) => "done: it runs there",
        (Role::Destination, State::Finished, _) => "done: it runs here",
        (_, _, true) => "under way",
        (Role::Source, State::Committed, _) => "in doubt: handed over, no answer (ferry resolve)",
        (Role::Destination, State::Whole, _) => "done: it runs here",
        (Role::Destination, State::Ready | State::Committed, _) => "in doubt (ferry resolve)",
        _ => "broken off (ferry resolve)",
    }
}

/// `ferry __guard JOURNAL`.
pub fn guard(args: &[std::ffi::OsString]) -> Result<(), Failed> {
    match args {
        [journal] => Ok(guards::guard(Path::new(journal))?),
        [forwarding, what, directory] if forwarding == "forward" => {
            let what = what.to_string_lossy();
            Ok(forward::process(&what, Path::new(directory))?)
        }
        [what, journal, will] if what == "pages" => {
            let will = will.to_str().and_then(|will| will.parse().ok());
            let will = will.ok_or_else(|| Failed::usage(anyhow!("no descriptor's number")))?;
            Ok(successors::go_on(Path::new(journal), will)?)
        }
        [what, journal] if what == "word" => Ok(word::sender(Path::new(journal))?),
        _ => Err(Failed::usage(anyhow!("the guard is for ferry itself"))),
    }
}
