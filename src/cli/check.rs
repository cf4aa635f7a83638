//! `ferry check`: what stands in the way, of this host or of a container.

use serde_json::json;

use super::args::{CheckArgs, Globals, IfMissing};
use super::common::{absolute, reach, resolved, runtime, say, say_json, state_dir};
use crate::migration::options::MigrateOptions;
use crate::migration::preflight::{host, source_checks};
use crate::migration::source;
use crate::migration::source::negotiate::{self, SourceOptions};
use crate::migration::transfer::memory_sender;
use crate::network;
use crate::problem::Problem;
use crate::report::exit::Failed;
use crate::report::log;
use crate::report::progress::{CopiedImage, NewNetwork, Reporter};

/// What would be there beside the container.
#[derive(Default)]
struct MadeThere {
    image: Option<CopiedImage>,
    networks: Vec<NewNetwork>,
}

/// `ferry check`.
pub fn check(globals: &Globals, args: &CheckArgs) -> Result<(), Failed> {
    let mut problems = host::problems();
    let fit = !problems.iter().any(|p| p.fatal);
    let mut made = MadeThere::default();
    let (result, conclusion) = match &args.container {
        None if fit => (Ok(()), check_host(globals, &mut problems)),
        Some(container) if fit => {
            check_container(globals, args, container, (&mut problems, &mut made))?
        }
        _ => (Ok(()), String::new()),
    };
    tell_check(&problems, result, (&conclusion, &made), args.json)
}

/// Tells whether this host can send and receive; what is fine about it.
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
    problems.extend(host::slow_criu(criu));
    format!(
        "{} can send and receive containers: Linux {}, CRIU {}, {}",
        crate::sys::host::name(),
        host::kernel(),
        host::criu_words(criu),
        name.replace(" version ", " ")
    )
}

/// Returns what stands in a container's way, here or on its way to the destination; else the conclusion.
fn check_container(
    globals: &Globals,
    args: &CheckArgs,
    container: &str,
    (problems, made): (&mut Vec<Problem>, &mut MadeThere),
) -> Result<(Result<(), Failed>, String), Failed> {
    let mut globals = globals.clone();
    let (id, runtime) = resolved(&mut globals, container)?;
    let wishes = MigrateOptions {
        container: id,
        bundle: absolute(args.bundle.as_deref())?,
        placement: args.network.clone(),
        move_address: args.move_address.clone(),
        forward: args.forward,
        console_socket: None,
        root: globals.root,
        systemd_cgroup: globals.systemd_cgroup,
        verify: false,
        check_only: true,
        rootfs: args.files.rootfs,
        no_image: args.image == IfMissing::Never,
        no_networks: args.network_create == IfMissing::Never,
        volumes: args.files.volume.clone(),
        state_dir: Some(state_dir()?),
    };

    let Some(destination) = &args.destination else {
        let looked = source_checks::inspect(&runtime, &wishes);
        problems.extend(looked.map_or_else(|problems| problems, |subject| subject.warnings));
        let said =
            format!("{container} can go, to a host that is fit for it: name one to check it");
        return Ok((Ok(()), said));
    };

    let options = SourceOptions {
        wishes,
        destination: reach(destination, &args.remote)?,
        memory: memory_sender::MemoryOptions::default(),
        timeout: args.timeout,
        leave_mark: false,
        remove_files: false,
    };

    let mut reporter = Reporter::quiet();
    let result = source::check(&runtime, &options, false, &mut reporter);
    problems.append(&mut reporter.warnings);
    made.image = reporter.report.image.take();
    made.networks = std::mem::take(&mut reporter.report.networks);

    Ok((result, format!("{container} can go to {}", options.destination)))
}

fn tell_check(
    problems: &[Problem],
    result: Result<(), Failed>,
    (conclusion, made): (&str, &MadeThere),
    as_json: bool,
) -> Result<(), Failed> {
    let fatal: Vec<Problem> = problems.iter().filter(|p| p.fatal).cloned().collect();
    let warnings: Vec<&Problem> = problems.iter().filter(|p| !p.fatal).collect();
    let result = if fatal.is_empty() { result } else { Err(negotiate::refusal(&fatal)) };
    if as_json {
        let mut all: Vec<_> = problems.iter().map(|p| json!(p)).collect();
        if let (Err(failed), true) = (&result, fatal.is_empty()) {
            all.push(json!({"what": format!("{:#}", failed.error), "fatal": true}));
        }
        let word = result.as_ref().map_or_else(|f| f.exit.word(), |()| "checked");
        let ok = result.is_ok();
        let mut said = json!({"event": "check", "result": word, "ok": ok, "problems": all});
        if let Some(image) = &made.image {
            said["image"] = json!(image);
        }
        if !made.networks.is_empty() {
            said["networks"] = json!(made.networks);
        }
        say_json(&said);
    } else {
        for warning in warnings {
            log::warn(&warning.to_string(), [warning.hint.as_str()]);
        }
        if result.is_ok() {
            made.networks.iter().for_each(|network| say(&network.words()));
            made.image.iter().for_each(|image| say(&image.words()));
            say(conclusion);
        }
    }

    result
}
