//! Keeps the frames that the closed fence stops, and sends them along as they come; after a
//! rollback gives them back to the container here.
//!
//! Without this every packet of the freeze would wait for its sender's retransmission timer: 200 ms
//! and more, longer than the freeze itself.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use anyhow::Result;

use super::udp_buffers::Room;
use super::udp_queues::Came;
use crate::migration::protocol::session::PeerWriter;
use crate::network::frames::encode;
use crate::network::{Capture, EthernetFrame, Replay};
use crate::oci::cgroup::Cgroup;
use crate::sys::process::wait_readable;

/// Most bytes kept for a rollback. Beyond it the senders' timers have to do.
const MOST: usize = 32 << 20;
/// The thread that takes stopped frames out of the capture and sends them along.
#[derive(Debug)]
pub struct PacketBuffer {
    stop: UnixStream,
    thread: JoinHandle<KeptFrames>,
}

/// What a buffer has when it ends.
#[derive(Default)]
struct KeptFrames {
    /// The first [`MOST`] bytes of it.
    frames: Vec<EthernetFrame>,
    /// Frames seen, those that waited unread among them.
    count: u64,
    /// Frames that the kernel dropped, since they came faster than they were read. packet(7)
    lost: u32,
}

impl PacketBuffer {
    /// Starts to keep what `capture` sees and to send it along, after what came before.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(capture: Capture, came: Came, peer: PeerWriter) -> Result<PacketBuffer> {
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new()
            .name("keep".into())
            .spawn(move || keep(capture, came, &peer, &stopped))?;
        Ok(PacketBuffer { stop, thread })
    }

    fn end(self) -> KeptFrames {
        // The thread may have ended by itself.
        let _ = (&self.stop).write_all(b"s");
        self.thread.join().unwrap_or_default()
    }

    /// Ends; how many frames there were, and how many the kernel had no room for.
    pub fn stop(self) -> (u64, u32) {
        let kept = self.end();
        (kept.count, kept.lost)
    }

    /// Ends, and gives the frames to the container here, whose fence is open again and which has this
    /// control group.
    pub fn give_back(self, cgroup: Option<&Cgroup>, prepare: impl FnOnce() -> Result<Replay>) {
        let frames = self.end().frames;
        if frames.is_empty() {
            return;
        }
        // Only a help: without it the senders' timers bring everything again.
        if let Ok(mut replay) = prepare() {
            let room = cgroup.and_then(|cgroup| Room::make(cgroup, &mut replay, &frames));
            for frame in &frames {
                let _ = replay.inject(frame);
            }
            room.into_iter().for_each(Room::put_back);
        }
    }
}

fn keep(mut capture: Capture, came: Came, peer: &PeerWriter, stopped: &UnixStream) -> KeptFrames {
    let (mut kept, mut size) = (Vec::new(), 0);
    let mut count = came.unread.len() as u64;
    // The dump notices a broken link; here it only means that nobody listens any more.
    let mut link_works = came.unread.iter().all(|frame| peer.packet(&encode(frame)).is_ok());
    let mut fresh = came.caught;
    loop {
        for frame in fresh.drain(..) {
            count += 1;
            link_works = link_works && peer.packet(&encode(&frame)).is_ok();
            size += frame.bytes.len();
            if size <= MOST {
                kept.push(frame);
            }
        }
        let Ok(ready) = wait_readable(&[capture.as_fd(), stopped.as_fd()], None) else { break };
        if capture.read(&mut fresh).is_err() || (ready.contains(&1) && fresh.is_empty()) {
            break;
        }
    }
    KeptFrames { frames: kept, count, lost: capture.lost().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::frames::{HEAD, decode};

    #[test]
    fn frames_survive_the_link() {
        let frame = EthernetFrame { link: 3, vnet_hdr: [7; 10], bytes: vec![9; 100] };
        assert_eq!(decode(&encode(&frame)).unwrap(), frame);
        let bytes = encode(&frame);
        for cut in 0..HEAD + 10 {
            assert!(decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }
}
