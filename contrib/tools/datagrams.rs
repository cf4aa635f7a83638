//! ferry-datagrams: clients that speak UDP to a container that is being migrated, and count what
//! they do not get: [`ask`] an echo or DNS server, or [`play`] a round of Teeworlds.
//!
//! Both say JSON, a line each: `{"ready":true}` when the server has answered, then whatever is asked
//! for on stdin: `report` (and `burst N`, for [`ask`]), and at the end (`finish`, the end of stdin,
//! or after `--for`) the report again.
//!
//! Exit code: 0 if there is a report, whatever it says; 1 if the server never answered, or has sent
//! the player away.
mod ask;
#[path = "../../bundles/common/mod.rs"]
mod common;
mod play;

use std::io::{self, BufRead};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{setsockopt, sockopt};

/// For answers that wait to be read: some thousand.
const ROOM: usize = 8 << 20;

/// Speak UDP to a server, and count what is lost.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Questions at fixed times, each with a number of its own
    Ask(ask::Options),
    /// A player in a game of Teeworlds 0.7
    Play(play::Options),
}

fn main() -> ExitCode {
    let result = match Options::parse().what {
        What::Ask(options) => ask::run(&options),
        What::Play(options) => play::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry-datagrams: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is said on stdin; with a limit its end says nothing, as a script in the background has none.
struct Words {
    said: Receiver<String>,
    end: Option<Instant>,
}

impl Words {
    fn listen(length: Option<Duration>) -> Words {
        let (tell, said) = channel();
        std::thread::spawn(move || {
            let lines = io::stdin().lock().lines();
            lines.map_while(Result::ok).all(|line| tell.send(line).is_ok())
        });
        Words { said, end: length.map(|length| Instant::now() + length) }
    }

    /// The next word; `finish` at the end.
    fn next(&self) -> Option<String> {
        if self.end.is_some_and(|end| Instant::now() >= end) {
            return Some("finish".into());
        }
        match self.said.try_recv() {
            Ok(word) => Some(word),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => self.end.is_none().then(|| "finish".into()),
        }
    }
}

/// A socket that hears of nobody but the server, and of it also that nobody listens there.
fn connect(to: &str) -> io::Result<UdpSocket> {
    let to = to.to_socket_addrs()?.next();
    let to = to.ok_or_else(|| io::Error::other("the server's name has no address"))?;
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    // What it counts as lost must not be lost here. Needs root.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &ROOM);
    Ok(socket)
}

/// One datagram into `buffer`, if one comes until then. That nobody listens there is an error.
fn hear(socket: &UdpSocket, buffer: &mut [u8], until: Instant) -> io::Result<Option<usize>> {
    let patience = until.saturating_duration_since(Instant::now());
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    if ppoll(&mut fds, Some(patience.into()), None)? == 0 {
        return Ok(None);
    }
    match socket.recv(buffer) {
        Ok(length) => Ok(Some(length)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}
