//! stdio-ticker: numbered lines out, lines in and echoed.
//!
//! For what a migration must do to standard streams: a reader of stdout sees
//! by the numbers whether a line was lost or came twice, and a writer to stdin
//! sees its lines come back.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{chdir, chroot, dup2_stderr, dup2_stdout, read};

#[path = "../common/units.rs"]
#[allow(dead_code)]
mod units;

/// Write a numbered line at every tick, and echo the lines of stdin.
#[derive(Parser)]
struct Options {
    /// The time between two lines
    #[arg(long, default_value = "10ms", value_parser = units::duration)]
    every: Duration,
    /// Write the numbered lines to this file as well
    #[arg(long)]
    file: Option<PathBuf>,
    /// Have stdout and stderr in this file, which is made with its directory
    #[arg(long)]
    onto: Option<PathBuf>,
    /// Add a byte that is in no UTF-8 to the name of that file
    #[arg(long)]
    odd_name: bool,
    /// Then have another root directory, which is made, too
    #[arg(long)]
    chroot: Option<PathBuf>,
    /// End after so many lines
    #[arg(long)]
    lines: Option<u64>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // stderr may be gone with stdout; `eprintln!` would panic.
            let _ = writeln!(io::stderr(), "stdio-ticker: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes it hard to tell from outside what stdout is.
fn hide(options: &Options) -> io::Result<()> {
    if let Some(onto) = &options.onto {
        let mut name = onto.clone().into_os_string();
        if options.odd_name {
            name.push(OsStr::from_bytes(b"\xff"));
        }
        fs::create_dir_all(onto.parent().unwrap_or(onto))?;
        let file = File::create(name)?;
        dup2_stdout(&file)?;
        dup2_stderr(&file)?;
    }
    if let Some(root) = &options.chroot {
        fs::create_dir_all(root)?;
        chroot(root)?;
        chdir("/")?;
    }
    Ok(())
}

fn run(options: &Options) -> io::Result<()> {
    // Read from a descriptor, because pid 1 of a container ignores it otherwise.
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK)?;
    hide(options)?;
    let mut file = options.file.as_ref().map(File::create).transpose()?;
    let stdin = io::stdin();
    let mut stdin_open = true;
    let mut unfinished = Vec::new();

    let mut number = 0;
    let mut due = Instant::now();
    loop {
        let now = Instant::now();
        // A clock that is far from `due` is another host's: start anew from there.
        if due > now + options.every || due + Duration::from_secs(1) < now {
            due = now;
        }

        if due <= now {
            number += 1;
            let line = format!("tick {number}\n");
            io::stdout().write_all(line.as_bytes()).and_then(|()| io::stdout().flush())?;
            if let Some(file) = &mut file {
                file.write_all(line.as_bytes())?;
            }

            if options.lines == Some(number) {
                return Ok(());
            }
            due += options.every;
            continue;
        }

        let wait = PollTimeout::try_from((due - now).as_millis().min(1000) as i32 + 1)
            .unwrap_or(PollTimeout::ZERO);
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if stdin_open {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }

        match poll(&mut fds, wait) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        if ready[0] {
            return Ok(());
        }

        if ready.get(1) == Some(&true) {
            stdin_open = echo(&stdin, &mut unfinished)?;
        }
    }
}

/// Reads what stdin has and echoes the whole lines; false at its end.
fn echo(stdin: &io::Stdin, unfinished: &mut Vec<u8>) -> io::Result<bool> {
    // Not through `Stdin`'s own buffer, which poll could not see.
    let mut buffer = [0; 4096];
    let length = match read(stdin.as_fd(), &mut buffer) {
        Ok(0) => return Ok(false),
        Ok(length) => length,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(true),
        // A terminal whose other side has been closed.
        Err(nix::errno::Errno::EIO) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    unfinished.extend_from_slice(&buffer[..length]);
    let mut stdout = io::stdout().lock();
    while let Some(end) = unfinished.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = unfinished.drain(..=end).collect();
        stdout.write_all(b"echo ")?;
        stdout.write_all(&line)?;
    }
    stdout.flush()?;
    Ok(true)
}
