//! `ferry migrate`: from its arguments to the migration, and back to an exit code.

use super::args::{Globals, IfMissing, MigrateArgs, SourceFiles};
use super::common::{absolute, reach, resolved, say, state_dir};
use crate::migration::options::MigrateOptions;
use crate::migration::source;
use crate::migration::source::negotiate::SourceOptions;
use crate::report::exit::Failed;
use crate::report::forecast::Forecast;
use crate::report::progress::Reporter;
use crate::sys::process;

/// `ferry migrate`.
pub fn migrate(globals: &Globals, args: &MigrateArgs) -> Result<(), Failed> {
    if args.die_with_parent {
        process::die_with_parent().map_err(|e| Failed::refused(e.into()))?;
    }
    let mut globals = globals.clone();
    let (container, runtime) = resolved(&mut globals, &args.container)?;
    let options = SourceOptions {
        wishes: MigrateOptions {
            container,
            bundle: absolute(args.bundle.as_deref())?,
            placement: args.network.clone(),
            move_address: args.move_address.clone(),
            forward: args.forward,
            console_socket: absolute(args.console_socket.as_deref())?,
            root: globals.root,
            systemd_cgroup: globals.systemd_cgroup,
            verify: args.memory.verify,
            check_only: args.dry_run,
            rootfs: args.files.rootfs,
            no_image: args.image == IfMissing::Never,
            no_networks: args.network_create == IfMissing::Never,
            volumes: args.files.volume.clone(),
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
