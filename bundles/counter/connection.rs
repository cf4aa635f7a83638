//! One client of the counter: its count, and the bytes that wait on either side.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use nix::sys::epoll::EpollFlags;

use crate::common::wire::REQUEST;

/// An accepted connection, non-blocking.
pub struct Connection {
    /// Counts given to this client.
    pub counts: u64,
    stream: TcpStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    writing: bool,
}

impl Connection {
    /// Takes over a stream just accepted.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        // The buffers stay empty until used: ten thousand idle clients cost little memory.
        Ok(Self { counts: 0, stream, incoming: vec![], outgoing: vec![], writing: false })
    }

    /// For epoll.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Takes in what has arrived; false when the client has gone.
    pub fn receive(&mut self) -> bool {
        let mut buffer = [0; 64 * REQUEST];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                self.incoming.extend_from_slice(&buffer[..length]);
                true
            }
            Err(error) => {
                matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            }
        }
    }

    /// The next whole request.
    pub fn next_request(&mut self) -> Option<[u8; REQUEST]> {
        let frame = *self.incoming.first_chunk::<REQUEST>()?;
        self.incoming.drain(..REQUEST);
        Some(frame)
    }

    /// Puts an answer in the queue.
    pub fn send(&mut self, answer: &[u8]) {
        self.outgoing.extend_from_slice(answer);
    }

    /// Writes as much as goes; false when the client has gone.
    pub fn flush(&mut self) -> bool {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// What epoll must be told, if it is something new.
    pub fn changed_interest(&mut self) -> Option<EpollFlags> {
        let writing = !self.outgoing.is_empty();
        if writing == self.writing {
            return None;
        }
        self.writing = writing;
        // While its answers do not fit, a client's further questions have to wait.
        Some(if writing { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN })
    }
}
