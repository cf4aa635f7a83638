//! The arguments of our own verbs, as clap reads them and as the rest of ferry gets them.
//!
//! The runtime's global flags mean the same here, before or after the verb.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::destination::{DestinationArg, Listen};
use super::units;
use crate::memory::converge::Goal;
use crate::memory::rounds::Tracking;
use crate::migration::protocol::How;
use crate::migration::protocol::forwarding::ForwardOption;
use crate::migration::transfer::memory_sender::MemoryOptions;
use crate::network::Placement;
use crate::network::floating::MoveAddress;
use crate::report::log::{ErrorLog, Format};
use crate::transport::codec::{self, Codec};
use crate::transport::pace::Pace;

/// A command line with a verb of ours.
#[derive(Debug, Parser)]
#[command(
    name = "ferry",
    version,
    about = "Carries a running container to another host; in all else it is runc",
    disable_help_subcommand = true,
    propagate_version = true
)]
pub struct Cli {
    /// What goes for all verbs.
    #[command(flatten)]
    pub globals: Globals,
    /// The verb with its own arguments.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The runtime's global flags.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options (as runc's)")]
pub struct Globals {
    /// Where the runtime keeps its containers' state [default: the runtime's own]
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Also write errors to this file; what --debug says goes there only
    #[arg(long, global = true, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// The form of that file
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: Format,
    /// The container's cgroup is systemd's
    #[arg(long, global = true)]
    pub systemd_cgroup: bool,
    /// Say on stderr, or in the file of --log, what is being done
    #[arg(long, global = true)]
    pub debug: bool,
    /// The container runtime: a path, or a name in PATH [default: runc]
    #[arg(long, global = true, value_name = "RUNTIME")]
    pub ferry_runtime: Option<OsString>,
}

impl Globals {
    /// Returns where errors go besides stderr.
    pub fn error_log(&self) -> ErrorLog {
        ErrorLog { file: self.log.clone(), format: self.log_format }
    }
}

/// Our verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Move a running container to another host
    Migrate(MigrateArgs),
    /// Take a container in; `ferry migrate` starts this on the other host
    Receive(ReceiveArgs),
    /// Tell what would stop a migration, before it starts
    Check(CheckArgs),
    /// List what is being migrated or was migrated, to and from this host
    Migrations(MigrationsArgs),
    /// Settle who owns a container after a crash in the middle of a migration
    Resolve(ResolveArgs),
    /// Print what makes a shell complete ferry's own verbs and options
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages: ferry(1), and one for each verb
    #[command(name = "__man", hide = true)]
    Man {
        /// An existing directory.
        directory: PathBuf,
    },
    /// For ferry itself
    #[command(name = "__guard", hide = true)]
    Guard {
        /// As whoever starts it agrees with itself.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

/// How the other host is reached; as in rsync.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct RemoteArgs {
    /// What to run in the place of ssh; a command with arguments
    #[arg(long, value_name = "COMMAND")]
    pub rsh: Option<String>,
    /// Where ferry is on the other host [default: ferry, in its PATH]
    #[arg(long, value_name = "PATH")]
    pub remote_ferry: Option<OsString>,
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  ferry completions bash >/usr/share/bash-completion/completions/ferry
  ferry completions zsh >/usr/share/zsh/vendor-completions/_ferry";

const MIGRATE_EXAMPLES: &str = "\
Examples:
  ferry migrate web host2
        move the container web to host2, over ssh
  ferry check web host2
        only tell whether that would work
  ferry migrate --bundle /srv/web web root@host2
        its bundle is at another place there
  ferry migrate --rsh 'ssh -i /etc/ferry/key' --timeout 30s web host2
        log in with a key of your own, and give up after half a minute
  ferry migrate --network macvlan=eth1 web host2
        its address goes on host2's eth1
  ferry migrate --move-address 10.0.0.5/24@eth0 web host2
        it uses this host's network, and 10.0.0.5 is its alone: that goes to host2's eth0

The container runs on here until the other host has all of it. Whatever fails before that
leaves it running here; once it runs there it cannot start here again, until
`ferry resolve CONTAINER --keep`.

Exit codes: 0 it runs there; 1 failed, it runs on here; 2 wrong usage; 3 refused, nothing
was touched; 4 in doubt, see `ferry resolve`.";

/// `ferry migrate`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = MIGRATE_EXAMPLES)]
pub struct MigrateArgs {
    /// The container's ID, or its name with podman or docker: `web`, `podman:web`, `docker:web`
    #[arg(value_parser = container_id)]
    pub container: String,
    /// Where it goes: [user@]host, ssh://[user@]host[:port] or unix:/path
    pub destination: DestinationArg,
    /// How the other host is reached.
    #[command(flatten)]
    pub remote: RemoteArgs,
    /// The bundle's directory on the other host [default: the same path as here]
    #[arg(long, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// How its network is made there: auto (as it is here), keep (the bundle's namespace is
    /// there already), none, bridge=BRIDGE, macvlan=INTERFACE, or hook=/PROGRAM: as auto, and the
    /// program, on both hosts, leads packets there (see docs/networks.md)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub network: Placement,
    /// For a container with the host's network: this address of the host goes along, to that
    /// interface there, as keepalived would move it. Nobody else may use it. May be given several
    /// times
    #[arg(long, value_name = "ADDRESS/PREFIX@INTERFACE")]
    pub move_address: Vec<MoveAddress>,
    /// Where its address cannot move it stays, and its packets are forwarded to and fro: whenever it
    /// belongs to no network of the other host, or this host translates addresses for it (auto),
    /// always, or never
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub forward: ForwardOption,
    /// A socket on the other host that receives the container's terminal
    #[arg(long, value_name = "PATH")]
    pub console_socket: Option<PathBuf>,
    /// What becomes of its files.
    #[command(flatten)]
    pub files: FilesArgs,
    /// The image that podman's or docker's container was made of: copied where the other host lacks it
    /// (auto), or it must be there (never)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub image: IfMissing,
    /// Networks that podman's or docker's container is in: made where the other host lacks one (auto), or
    /// they must be there (never)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub network_create: IfMissing,
    /// What is done here with the files that were copied, once it runs there
    #[arg(long, value_name = "HOW", default_value = "keep")]
    pub source_files: SourceFiles,
    /// How its memory is to go.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Give up if it is not handed over by then: 500ms, 30s, 5m
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    pub timeout: Option<Duration>,
    /// End as by SIGTERM when whoever has called this ends, however that comes: it is not carried on
    /// unseen. Once it is handed over, it is finished all the same
    #[arg(long)]
    pub die_with_parent: bool,
    /// Do everything that leaves the container alone, and stop there
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON event a line, the report last
    #[arg(long)]
    pub json: bool,
    /// Write the report, as JSON, to this file
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Afterwards refuse to start a container of this ID here (this is the default)
    #[arg(long, overrides_with = "no_mark")]
    pub leave_mark: bool,
    /// Afterwards let the ID be used again here: whoever restarts it makes a second copy
    #[arg(long, overrides_with = "leave_mark")]
    pub no_mark: bool,
}

/// What becomes of the container's files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct FilesArgs {
    /// The root file system: whatever turns out (auto), there without a proof (shared), or copied
    /// while the container runs unless both hosts see it (copy, and auto)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub rootfs: How,
    /// The same for what is bound to a place in the container: /data=copy. By itself nothing of
    /// that is copied, as others may use it. May be given several times
    #[arg(long, value_name = "PLACE=HOW", value_parser = volume)]
    pub volume: Vec<(PathBuf, How)>,
}

/// `--image`, `--network-create`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IfMissing {
    /// Copied or made where it is not there.
    Auto,
    /// It must be there.
    Never,
}

/// `--source-files`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceFiles {
    /// They stay.
    Keep,
    /// They go.
    Remove,
}

fn volume(text: &str) -> Result<(PathBuf, How), String> {
    let (place, how) = text.rsplit_once('=').ok_or("as in /data=copy")?;
    if !place.starts_with('/') {
        return Err("the place in the container begins with /".into());
    }
    Ok((place.into(), How::from_str(how, false)?))
}

/// How memory is to go.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct MemoryArgs {
    /// Freeze when what is left of the memory takes no longer than this on the link: 50ms, 1s
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = units::duration)]
    pub max_downtime: Duration,
    /// Copy memory while the container runs (auto), or all of it in the freeze (off)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub precopy: Precopy,
    /// What does not get less while the container runs follows when it runs over there (auto), or
    /// goes in the freeze, however long that takes (never). Until it has followed, the container
    /// needs both hosts
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub postcopy: Postcopy,
    /// Go over the memory of the running container at most so often
    #[arg(long, value_name = "N", default_value_t = 10,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_rounds: u32,
    /// Memory, and files while it runs, take no more of the link: 100Mbit, 20M [default: all they can]
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub bandwidth: Option<u64>,
    /// Compression: whatever is quickest (auto), zstd, lz4 or none
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub compress: Compress,
    /// Send memory over so many connections: one ssh carries no more than one core can encipher
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=32))]
    pub streams: u8,
    /// Before it is handed over, compare all memory on both hosts, page by page; if anything differs it
    /// runs on here. It stands still meanwhile, about a second for each 2 GiB, and nothing follows
    /// afterwards (as with --postcopy never)
    #[arg(long)]
    pub verify: bool,
    /// How changes are found: asked of the kernel, or by comparing; for tests
    #[arg(long, value_name = "HOW", default_value = "auto", hide = true)]
    pub tracking: Tracking,
}

/// `--precopy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precopy {
    /// While it runs.
    Auto,
    /// Not before the freeze.
    Off,
}

/// `--postcopy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Postcopy {
    /// What does not converge follows.
    Auto,
    /// Nothing follows.
    Never,
}

/// `--compress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Whatever is quickest.
    Auto,
    /// Zstandard.
    Zstd,
    /// LZ4.
    Lz4,
    /// None.
    None,
}

impl MemoryArgs {
    /// In the migration's own terms.
    pub fn wishes(&self) -> MemoryOptions {
        MemoryOptions {
            goal: Goal {
                max_downtime: self.max_downtime,
                max_rounds: match self.precopy {
                    Precopy::Auto => self.max_rounds as usize,
                    Precopy::Off => 0,
                },
                // What is not there cannot be compared.
                postcopy: self.postcopy == Postcopy::Auto && !self.verify,
            },
            tracking: self.tracking,
            compress: match self.compress {
                Compress::Auto => codec::CompressOption::Auto,
                Compress::Zstd => codec::CompressOption::Always(Codec::Zstd),
                Compress::Lz4 => codec::CompressOption::Always(Codec::Lz4),
                Compress::None => codec::CompressOption::Always(Codec::None),
            },
            pace: Pace::new(self.bandwidth),
            streams: usize::from(self.streams),
        }
    }
}

fn bandwidth(text: &str) -> Result<u64, String> {
    match units::rate(text)? {
        0 => Err("nothing would ever get there".into()),
        rate => Ok(rate),
    }
}

const RECEIVE_EXAMPLES: &str = "\
Examples:
  ferry receive --stdio
        what `ferry migrate` runs over ssh on this host
  ferry receive --listen unix:/run/ferry.sock
        for a tunnel of your own, or for trying it out on one host";

/// `ferry receive`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = RECEIVE_EXAMPLES)]
pub struct ReceiveArgs {
    /// Talk to the source over standard input and output
    #[arg(long, required_unless_present = "listen", conflicts_with = "listen")]
    pub stdio: bool,
    /// Wait for the source here: unix:/path
    #[arg(long, value_name = "WHERE")]
    pub listen: Option<Listen>,
    /// Who reads stderr is not the source: tell what the source is told, too
    #[arg(long, hide = true)]
    pub own_stderr: bool,
}

const CHECK_EXAMPLES: &str = "\
Examples:
  ferry check
        is this host fit to send and receive containers?
  ferry check web
        can web be moved at all?
  ferry check web host2
        can web be moved to host2?

Exit codes: 0 nothing stands in the way; 3 something does.";

/// `ferry check`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = CHECK_EXAMPLES)]
pub struct CheckArgs {
    /// The container's ID, or its name with podman or docker: `web`, `podman:web`, `docker:web`
    #[arg(value_parser = container_id)]
    pub container: Option<String>,
    /// Where it would go, as in `ferry migrate`
    pub destination: Option<DestinationArg>,
    /// How the other host is reached.
    #[command(flatten)]
    pub remote: RemoteArgs,
    /// The bundle's directory on the other host [default: the same path as here]
    #[arg(long, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// What would become of its files.
    #[command(flatten)]
    pub files: FilesArgs,
    /// Whether its image would be copied, as in `ferry migrate`
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub image: IfMissing,
    /// Whether its networks would be made, as in `ferry migrate`
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub network_create: IfMissing,
    /// How its network would be made there, as in `ferry migrate`
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub network: Placement,
    /// Addresses of the host that would go along, as in `ferry migrate`
    #[arg(long, value_name = "ADDRESS/PREFIX@INTERFACE")]
    pub move_address: Vec<MoveAddress>,
    /// Whether its address would stay, as in `ferry migrate`
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub forward: ForwardOption,
    /// Give up if the other host has not answered by then: 500ms, 30s, 5m
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    pub timeout: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

const MIGRATIONS_EXAMPLES: &str = "\
Examples:
  ferry migrations
        all of them, the latest last
  ferry migrations --json web
        those of the container web, for a script";

/// `ferry migrations`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = MIGRATIONS_EXAMPLES)]
pub struct MigrationsArgs {
    /// Only those of this container, or the one migration of this ID
    #[arg(value_parser = container_id)]
    pub id: Option<String>,
    /// Print JSON, one migration a line
    #[arg(long)]
    pub json: bool,
}

const RESOLVE_EXAMPLES: &str = "\
Examples:
  ferry resolve web
        ask the other host, and do what follows from its answer
  ferry resolve web --keep
        the other host is gone for good: this one owns web (again); what is frozen here runs
        on, and the mark that keeps it from being started is lifted
  ferry resolve web --discard
        the other host owns web: what is left of it here goes away
  ferry resolve --all --timeout 5m
        all that are open here, and what hosts that were away have still to be told
  ferry resolve web --no-forward
        web runs on another network, and its old address is needed no more
  ferry resolve web --no-forward --when-idle
        the same as soon as its last connection over the old address has ended

--keep and --discard are your word that the other host does not run it. If it does, there
will be two copies.";

/// `ferry resolve`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = RESOLVE_EXAMPLES)]
pub struct ResolveArgs {
    /// The container's ID, or the migration's
    #[arg(value_parser = container_id, required_unless_present = "all")]
    pub id: Option<String>,
    /// All that are open on this host: what is under way is left alone, hosts that do not answer are
    /// asked again, and old journals are removed
    #[arg(long, conflicts_with_all = ["id", "keep", "discard", "no_forward"])]
    pub all: bool,
    /// As the unit ferry-resolve.service does it: asks until everybody has answered, however long that
    /// takes, and says to systemd after the first round that engines may start
    #[arg(long, requires = "all", conflicts_with_all = ["id", "timeout"])]
    pub boot: bool,
    /// Wait no longer than this for other hosts and processes: 500ms, 30s, 5m [default: 1m]
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    pub timeout: Option<Duration>,
    /// This host owns the container
    #[arg(long, conflicts_with = "discard")]
    pub keep: bool,
    /// The other host owns the container
    #[arg(long)]
    pub discard: bool,
    /// Its address is not to be forwarded any more: it has moved, or nobody needs it
    #[arg(long, conflicts_with_all = ["keep", "discard"])]
    pub no_forward: bool,
    /// Not before it had no open TCP connection over that address for so long
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "30s", requires = "no_forward", value_parser = units::duration)]
    pub when_idle: Option<Duration>,
    /// How the other host is reached.
    #[command(flatten)]
    pub remote: RemoteArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// An ID, or what an engine calls a container, with or without the engine's name before it.
fn container_id(text: &str) -> Result<String, String> {
    let name = match text.split_once(':') {
        Some((engine, name)) if crate::engine::Engine::of_word(engine).is_some() => name,
        _ => text,
    };
    if crate::oci::container_id::valid_id(OsStr::new(name)) {
        Ok(text.to_owned())
    } else {
        Err("an ID is made of letters, digits, and _ + . -".into())
    }
}

impl MigrateArgs {
    /// Tells whether the source must refuse to start the container afterwards.
    pub fn mark(&self) -> bool {
        !self.no_mark
    }
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
