//! What becomes of the copy that is held.

use std::sync::mpsc::RecvTimeoutError;

use super::outstanding::Outstanding;
use super::phase::{Phase, Ready};
use super::{DestinationInput, DestinationInputs, IncomingMigration, SILENCE};
use crate::memory::serve::Ended;
use crate::migration::checkpoint::restore::RestoreEvent;
use crate::migration::protocol::session::{FromPeer, PeerWriter};
use crate::migration::protocol::{Message, Verdict};
use crate::migration::recovery::decide::{Act, CopyEvent, hear};
use crate::migration::recovery::verdicts::ControlCall;
use crate::migration::transfer::receiver::want;
use crate::sys::fault;
use crate::transport::frame::Frame;

impl IncomingMigration {
    /// Restored and held: the source decides, however long it takes. What is to come if it is ours.
    pub(super) fn await_verdict(
        &mut self,
        mut ready: Ready,
        peer: &PeerWriter,
        inputs: &mut DestinationInputs,
    ) -> Option<Outstanding> {
        let phase = ready.phase();
        loop {
            let mut failed = None;
            let input = match inputs.queue.recv_timeout(fault::limit(SILENCE)) {
                Ok(input) => input,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return None,
            };

            let event = match input {
                DestinationInput::FromPeer(FromPeer::Message(Message::Commit)) => {
                    CopyEvent::Verdict(Verdict::Commit)
                }
                DestinationInput::FromPeer(FromPeer::Message(Message::Abort { .. })) => {
                    CopyEvent::Verdict(Verdict::Abort)
                }
                DestinationInput::FromPeer(FromPeer::Frame(Frame::Packet(bytes))) => {
                    // A damaged one is the sender's timer's business.
                    let _ = self.network.keep(&bytes);
                    continue;
                }
                DestinationInput::Call(ControlCall::Verdict(verdict, reply)) => {
                    let event = verdict.map_or(CopyEvent::Asked, CopyEvent::Verdict);
                    if let (_, Some(standing)) = hear(phase, event) {
                        // Whoever asked may have gone.
                        let _ = reply.send(standing);
                    }
                    event
                }
                DestinationInput::Call(ControlCall::Discard(reply)) => {
                    let event = CopyEvent::Verdict(Verdict::Abort);
                    if let (_, Some(standing)) = hear(phase, event) {
                        let _ = reply.send(standing);
                    }
                    event
                }
                DestinationInput::Pages(Ended { result: Ok(served), held }) => {
                    self.pages = Some(Ended { result: Ok(served), held });
                    continue;
                }
                // Its memory cannot be put into it; there is nothing that could run.
                DestinationInput::Pages(Ended { result: Err(e), .. }) => {
                    failed = Some(format!("{e:#}"));
                    CopyEvent::Broken
                }
                // The copy has died while it was held; there is nothing to run any more.
                DestinationInput::Restore(RestoreEvent::Ended(_) | RestoreEvent::Died) => {
                    failed = Some("the restored copy was killed while it waited".to_owned());
                    CopyEvent::Broken
                }
                DestinationInput::Want(run) => {
                    drop(want(peer, run));
                    continue;
                }
                DestinationInput::FromPeer(FromPeer::Gone(_)) => {
                    ready.link = false;
                    CopyEvent::Unlinked
                }
                DestinationInput::FromPeer(FromPeer::Message(message)) => {
                    tracing::warn!("{:#}", Phase::Ready(ready).refuse_message(&message));
                    continue;
                }
                // A signal is no verdict either.
                DestinationInput::FromPeer(FromPeer::Frame(_))
                | DestinationInput::Restore(_)
                | DestinationInput::Signal(_)
                | DestinationInput::Settled(_)
                | DestinationInput::ChannelEnded(_)
                | DestinationInput::Files(_)
                | DestinationInput::Synced
                | DestinationInput::Led
                | DestinationInput::Noted
                | DestinationInput::Guarded
                | DestinationInput::Engaged(_)
                | DestinationInput::TasksEnded
                | DestinationInput::Awaited(_)
                | DestinationInput::Call(ControlCall::Link(..) | ControlCall::Channel(..)) => {
                    continue;
                }
            };

            match hear(phase, event).0 {
                Act::Wait => {}
                Act::Run => return Some(ready.commit(!self.incoming.is_empty())),
                Act::Undo => {
                    if let Some(why) = failed {
                        let (phase, hints) = (self.doing.to_owned(), Vec::new());
                        let _ = peer.send(&Message::Failed { phase, why, hints });
                    }
                    return None;
                }
            }
        }
    }
}
