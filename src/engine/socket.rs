//! A question to an engine's daemon, or a request: one over its unix socket.
//!
//! The daemon may hang, and whoever listens there may answer anything: time and bytes are limited.

use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::Value;

/// Time that a daemon may take to answer.
const LIMIT: Duration = Duration::from_secs(1);
/// The longest beginning of an answer.
const MAX_HEAD: usize = 64 << 10;
/// The longest answer that is read.
const MAX_ANSWER: u64 = 4 << 20;

/// Returns what the daemon knows, `None` if it says that there is no such thing. `path` must need no escapes.
///
/// # Errors
/// `NotFound` and `ConnectionRefused` when no daemon is there; `TimedOut` when it says nothing;
/// `InvalidData` when it says something else than JSON.
pub(super) fn get(at: &Path, path: &str) -> io::Result<Option<Value>> {
    let answer = request(at, "GET", path, None, LIMIT)?;
    match answer.status {
        200 => Ok(Some(
            serde_json::from_slice(&answer.body).map_err(|_| odd("it does not send JSON"))?,
        )),
        404 => Ok(None),
        _ => Err(odd("it does not answer the question")),
    }
}

/// What a daemon has said.
#[derive(Debug)]
pub(super) struct DaemonAnswer {
    /// As in RFC 9110.
    pub status: u16,
    /// JSON, if anything.
    pub body: Vec<u8>,
}

/// Asks for something, with a body in JSON where there is one.
///
/// # Errors
/// See [`get`].
pub(super) fn request(
    at: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
    limit: Duration,
) -> io::Result<DaemonAnswer> {
    let until = Instant::now() + limit;
    let mut stream = connect_within(at, limit)?;

    // HTTP/1.0: an answer in one piece, which ends with the connection.
    let mut text = format!("{method} {path} HTTP/1.0\r\nHost: ferry\r\n");
    let body = body.map(serde_json::to_vec).transpose()?;
    if let Some(body) = &body {
        let length = body.len();
        text.push_str(&format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"));
    }

    text.push_str("\r\n");
    stream.write_all(text.as_bytes())?;
    stream.write_all(&body.unwrap_or_default())?;
    parse(&read_until(&mut stream, until)?)
}

/// Asks for something that comes as a stream: what it begins with, as far as that has come, and all of it.
/// Where the answer is another than `200`, its body is in it. `limit` is for each piece.
///
/// # Errors
/// See [`get`].
pub(super) fn stream(
    at: &Path,
    path: &str,
    limit: Duration,
) -> io::Result<(DaemonAnswer, impl Read + Send + use<>)> {
    let mut stream = connect_within(at, limit)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: ferry\r\n\r\n").as_bytes())?;
    stream.set_read_timeout(Some(limit))?;
    let mut begun = Vec::new();
    let mut piece = vec![0; 4 << 10];

    while !begun.windows(4).any(|four| four == b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => break,
            _ if begun.len() > MAX_HEAD => return Err(odd("its answer has no end")),
            n => begun.extend(&piece[..n]),
        }
    }

    let mut answer = parse(&begun)?;
    if answer.status != 200 {
        answer.body.extend(read_until(&mut stream, Instant::now() + LIMIT)?);
    }
    Ok((
        DaemonAnswer { status: answer.status, body: answer.body.clone() },
        Cursor::new(answer.body).chain(stream),
    ))
}

/// Sends a file, and returns the answer. `limit` is for each piece, and for the answer.
///
/// # Errors
/// See [`get`].
pub(super) fn send(
    at: &Path,
    path: &str,
    mut file: File,
    limit: Duration,
) -> io::Result<DaemonAnswer> {
    let mut stream = connect_within(at, limit)?;
    let length = file.metadata()?.len();
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: ferry\r\nContent-Type: application/x-tar\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    // One that takes no more says why.
    let sent = io::copy(&mut file, &mut stream);
    match read_until(&mut stream, Instant::now() + limit).and_then(|answer| parse(&answer)) {
        Ok(answer) => Ok(answer),
        Err(e) => sent.and(Err(e)),
    }
}

/// Reads an answer to its end.
fn read_until(stream: &mut UnixStream, until: Instant) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(n) if answer.len() as u64 + n as u64 > MAX_ANSWER => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its answer has no end"));
            }
            Ok(n) => answer.extend(&piece[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(e) => return Err(e),
        }
    }

    Ok(answer)
}

/// A daemon that hangs does not take connections either, once there are too many: connect(2) obeys the
/// socket's limit for sending. socket(7)
fn connect_within(at: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(limit.as_secs() as i64, 0))?;
    connect(socket.as_raw_fd(), &UnixAddr::new(at)?).map_err(|e| match e {
        nix::errno::Errno::EAGAIN => io::ErrorKind::TimedOut.into(),
        e => io::Error::from(e),
    })?;
    Ok(UnixStream::from(socket))
}

/// An answer's parts. RFC 9112.
fn parse(answer: &[u8]) -> io::Result<DaemonAnswer> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = answer.split_at(end.ok_or_else(|| odd("it does not speak HTTP"))?);
    let head = std::str::from_utf8(head).map_err(|_| odd("it does not speak HTTP"))?;
    let status = head.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    let status = status.ok_or_else(|| odd("it does not speak HTTP"))?;
    Ok(DaemonAnswer { status, body: body[4..].to_vec() })
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A daemon that says this to whoever asks, and what it was asked.
    fn ask(says: &'static [u8]) -> (io::Result<Option<Value>>, String) {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("socket");
        let listener = UnixListener::bind(&at).unwrap();
        let daemon = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = vec![0; 1000];
            let n = stream.read(&mut asked).unwrap();
            let _ = stream.write_all(says);
            String::from_utf8_lossy(&asked[..n]).into_owned()
        });
        (get(&at, "/containers/web/json"), daemon.join().unwrap())
    }

    #[test]
    fn an_answer_is_taken_and_nothing_else() {
        let (answer, asked) = ask(b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\n{\"Id\":\"ab\"}\n");
        assert_eq!(answer.unwrap().unwrap()["Id"], "ab");
        assert!(asked.starts_with("GET /containers/web/json HTTP/1.0\r\n"), "{asked}");
        let none = ask(b"HTTP/1.0 404 Not Found\r\n\r\n{\"message\":\"No such container\"}").0;
        assert_eq!(none.unwrap(), None);
        for odd in [
            &b"HTTP/1.0 200 OK\r\n\r\n<html>"[..],
            b"",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.0 500 \r\n\r\n",
        ] {
            assert_eq!(ask(odd).0.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_request_has_a_body() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("socket");
        let listener = UnixListener::bind(&at).unwrap();
        let daemon = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"{\"Name\":\"data\"}") {
                let mut piece = [0; 100];
                let n = stream.read(&mut piece).unwrap();
                assert!(n > 0, "{}", String::from_utf8_lossy(&asked));
                asked.extend(&piece[..n]);
            }
            stream.write_all(b"HTTP/1.0 201 Created\r\n\r\n{}").unwrap();
            String::from_utf8(asked).unwrap()
        });
        let body = serde_json::json!({ "Name": "data" });
        let answer = request(&at, "POST", "/volumes/create", Some(&body), LIMIT).unwrap();
        assert_eq!((answer.status, answer.body), (201, b"{}".to_vec()));
        let asked = daemon.join().unwrap();
        assert!(asked.starts_with("POST /volumes/create HTTP/1.0\r\n"), "{asked}");
        assert!(asked.contains("\r\nContent-Length: 15\r\n"), "{asked}");
    }

    #[test]
    fn a_daemon_that_hangs_or_floods_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("socket");
        assert_eq!(get(&at, "/").unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&at).unwrap();
        // Taken by nobody.
        assert_eq!(get(&at, "/").unwrap_err().kind(), io::ErrorKind::TimedOut);
        let flood = std::thread::spawn(move || {
            let waiting = listener.accept().unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(&[b' '; 64 << 10]).is_ok() {}
            drop(waiting);
        });
        assert_eq!(get(&at, "/").unwrap_err().kind(), io::ErrorKind::InvalidData);
        flood.join().unwrap();
        assert_eq!(get(&at, "/").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
