//! Places where a test build can be told to fail. Without the feature `faults` a point is nothing.
//!
//! `FERRY_FAULT=POINT:ACTION[,POINT:ACTION…]` arms them. Actions:
//!
//! - `kill`: this process ends by SIGKILL, as by the kernel's memory killer.
//! - `error`: the point returns an error, as a step that failed would; `error-once`: the first time.
//! - `enospc`, `eio`: the same, as a disk that is full, or broken, would make it fail.
//! - `panic`: this thread panics, as by a fault of Ferry's own.
//! - `hold`: writes the process's number to `/run/ferry-fault/POINT` and waits until the file is gone: a
//!   test then does from outside what it likes (a signal, a cut link, a killed CRIU).
//! - `spoil`: whoever the point belongs to changes a byte of what it holds, as a fault of the memory or
//!   of Ferry would ([`spoils`]).
//!
//! A held point goes on by itself after a minute: a test that died must leave no process behind.
//!
//! `FERRY_FAULT_LIMIT=N`: no limit of half a minute and more is longer than N seconds ([`limit`]), so that a
//! test can wait for the end of each.

#[cfg(feature = "faults")]
pub use armed::{limit, point, spoils};

/// Nothing: the feature `faults` is off.
///
/// # Errors
/// Never.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_: &str) -> anyhow::Result<()> {
    Ok(())
}

/// Returns how long something may take: as long as is said, but where a test has made it shorter.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn limit(usual: std::time::Duration) -> std::time::Duration {
    usual
}

#[cfg(feature = "faults")]
mod armed {
    use std::fs;
    use std::path::Path;
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use anyhow::{Result, bail};
    use nix::sys::signal::{Signal, raise};

    /// Where held points are told and let go.
    const HOLDS: &str = "/run/ferry-fault";
    const LONGEST: Duration = Duration::from_secs(60);

    /// Points that have failed once.
    static COME_BY: Mutex<Vec<String>> = Mutex::new(Vec::new());

    /// A place where a fault may be armed, by its name.
    ///
    /// # Errors
    /// When this point is armed with `error`.
    pub fn point(name: &str) -> Result<()> {
        match action(name).as_deref() {
            None | Some("spoil") => Ok(()),
            Some("kill") => {
                raise(Signal::SIGKILL)?;
                Ok(())
            }
            Some("error") => bail!("an injected fault at {name}"),
            Some("error-once") => match COME_BY.lock() {
                Ok(mut seen) if !seen.iter().any(|one| one == name) => {
                    seen.push(name.to_owned());
                    bail!("an injected fault at {name}")
                }
                _ => Ok(()),
            },
            Some("enospc") => Err(std::io::Error::from_raw_os_error(libc::ENOSPC).into()),
            Some("eio") => Err(std::io::Error::from_raw_os_error(libc::EIO).into()),
            Some("panic") => panic!("an injected fault at {name}"),
            Some("hold") => hold(name),
            Some(other) => bail!("FERRY_FAULT: no action {other}"),
        }
    }

    /// Returns how long something may take that usually may take this.
    pub fn limit(usual: Duration) -> Duration {
        let longest = std::env::var("FERRY_FAULT_LIMIT").ok().and_then(|n| n.parse().ok());
        let long = usual >= Duration::from_secs(30);
        longest.filter(|_| long).map_or(usual, |n| usual.min(Duration::from_secs(n)))
    }

    /// Tells whether this point is armed with `spoil`.
    pub fn spoils(name: &str) -> bool {
        action(name).is_some_and(|action| action == "spoil")
    }

    fn action(name: &str) -> Option<String> {
        let armed = std::env::var("FERRY_FAULT").ok()?;
        armed.split(',').find_map(|one| {
            let (point, action) = one.split_once(':')?;
            (point == name).then(|| action.to_owned())
        })
    }

    fn hold(name: &str) -> Result<()> {
        fs::create_dir_all(HOLDS)?;
        let file = Path::new(HOLDS).join(name);
        let fresh = file.with_extension("new");
        fs::write(&fresh, std::process::id().to_string())?;
        fs::rename(&fresh, &file)?;
        let until = Instant::now() + LONGEST;
        while file.exists() && Instant::now() < until {
            // The condition is a file's absence, looked at every few milliseconds.
            std::thread::park_timeout(Duration::from_millis(3));
        }
        // Once: a loop that comes by again is not held again.
        Ok(())
    }
}
