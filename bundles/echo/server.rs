//! echo-server: sends back what it gets, over TCP and UDP on one port.
//!
//! The simplest workload with several kinds of sockets. It keeps no state but the
//! connections themselves.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Send back what comes in, over TCP and UDP.
#[derive(Parser)]
struct Options {
    /// Where to listen
    #[arg(long, default_value = "0.0.0.0:7007", value_name = "ADDR:PORT")]
    listen: SocketAddr,

    /// Bind a unix socket there, too
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
}

struct Client {
    stream: TcpStream,
    /// Read and not yet written back.
    pending: Vec<u8>,
}

fn main() -> ExitCode {
    match serve(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Options) -> io::Result<()> {
    // Read from a descriptor, because pid 1 of a container ignores it otherwise.
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK)?;
    let tcp = TcpListener::bind(options.listen)?;
    let udp = UdpSocket::bind(options.listen)?;
    if let Some(path) = &options.unix {
        let listener = UnixListener::bind(path)?;
        // That it can be reached is all that is asked of it.
        std::thread::spawn(move || listener.incoming().for_each(drop));
    }

    tcp.set_nonblocking(true)?;
    udp.set_nonblocking(true)?;
    println!("ready");

    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(tcp.as_fd(), PollFlags::POLLIN),
            PollFd::new(udp.as_fd(), PollFlags::POLLIN),
        ];

        fds.extend(clients.iter().map(|client| {
            let wants =
                if client.pending.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            PollFd::new(client.stream.as_fd(), wants)
        }));

        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        if ready[0] {
            return Ok(());
        }

        let mut each = ready[3..].iter();
        clients.retain_mut(|client| !*each.next().unwrap_or(&false) || echo(client).is_ok());
        if ready[1] {
            while let Ok((stream, _)) = tcp.accept() {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                clients.push(Client { stream, pending: Vec::new() });
            }
        }

        if ready[2] {
            let mut datagram = [0; 65536];
            while let Ok((length, from)) = udp.recv_from(&mut datagram) {
                // UDP may lose: so may we.
                let _ = udp.send_to(&datagram[..length], from);
            }
        }
    }
}

/// Moves bytes as far as they go; an error means that the client has gone.
fn echo(client: &mut Client) -> io::Result<()> {
    if client.pending.is_empty() {
        let mut buffer = [0; 65536];
        match client.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => client.pending.extend_from_slice(&buffer[..length]),
            Err(error) => return unless_later(error),
        }
    }
    match client.stream.write(&client.pending) {
        Ok(written) => drop(client.pending.drain(..written)),
        Err(error) => return unless_later(error),
    }
    Ok(())
}

fn unless_later(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}
