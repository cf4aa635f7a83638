//! Telling a service manager that a unit of `Type=notify` is up. sd_notify(3)

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Says once that we are up: when told to, or when the time is over.
#[derive(Debug)]
pub struct Readiness(Option<Sender<()>>);

impl Readiness {
    /// Waits for so long, at most. `socket` is the manager's, as `NOTIFY_SOCKET` has it; without one
    /// nobody is told anything.
    pub fn within(limit: Duration, socket: Option<OsString>) -> Readiness {
        let Some(socket) = socket else { return Readiness(None) };
        let (tell, told) = channel();
        let wait = move || {
            // Whoever would have told us has ended without a word: so has this.
            if told.recv_timeout(limit) != Err(RecvTimeoutError::Disconnected) {
                notify(&socket, b"READY=1");
            }
        };
        // Without a thread the manager's own limit has to do.
        let _ = std::thread::Builder::new().name("ready".into()).spawn(wait);
        Readiness(Some(tell))
    }

    /// We are.
    pub fn now(&self) {
        if let Some(tell) = &self.0 {
            // It has been said.
            let _ = tell.send(());
        }
    }
}

/// Nobody has to listen.
fn notify(socket: &OsStr, state: &[u8]) {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(socket),
    };
    let sent = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(state, &to));
    if let Err(e) = sent {
        tracing::warn!("telling the service manager: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_once_and_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let socket = || Some(path.clone().into_os_string());
        let mut word = [0; 64];
        for limit in [Duration::from_secs(3600), Duration::ZERO] {
            let ready = Readiness::within(limit, socket());
            if limit > Duration::ZERO {
                ready.now();
                ready.now();
            }
            let length = manager.recv(&mut word).unwrap();
            assert_eq!(&word[..length], b"READY=1");
        }
        let _quiet = Readiness::within(Duration::ZERO, None);
        manager.set_nonblocking(true).unwrap();
        assert!(manager.recv(&mut word).is_err());
    }
}
