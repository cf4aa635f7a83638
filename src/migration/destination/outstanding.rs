//! What is still to come when the container is ours: of the restore, of its memory, of its files, of what
//! the source is to hear.

use anyhow::Result;

use super::phase::Phase;
use crate::memory::serve::Served;
use crate::migration::protocol::{Message, Standing};
use crate::migration::recovery::decide;

/// What has come true since the commit. Nothing of it is taken back but the link.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outstanding {
    /// Pages that stayed on the source until after the commit.
    left: u64,
    /// The link to the source works, as far as is known.
    pub(super) link: bool,
    /// The container runs.
    pub(super) running: bool,
    /// The disk knows that it may.
    pub(super) noted: bool,
    /// The source has been told that it runs, and that all of it is here.
    pub(super) told_running: bool,
    pub(super) told_whole: bool,
    /// Files that were copied are on the disk.
    pub(super) synced: bool,
    /// Its packets are led here: until then the source sends along what comes there.
    pub(super) led: bool,
    /// All pages are in.
    pub(super) served: Option<Served>,
    /// CRIU and the runtime have ended.
    pub(super) restored: bool,
    /// Its init process is there, as far as is known.
    pub(super) alive: bool,
    /// The source has cleared away what it had.
    pub(super) finished: bool,
}

/// What the source is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToTell {
    /// It runs.
    Running,
    /// All of it is here.
    Whole(Served),
}

impl Outstanding {
    /// At the commit: whether the link works, whether no files were copied, how many pages stayed there.
    pub(super) fn new(link: bool, synced: bool, left: u64) -> Outstanding {
        Outstanding {
            left,
            link,
            running: false,
            noted: false,
            told_running: false,
            told_whole: false,
            synced,
            led: true,
            served: None,
            restored: false,
            alive: true,
            finished: false,
        }
    }

    /// Tells whether nobody has anything to do for it any more, here or there.
    pub(super) fn is_over(&self) -> bool {
        let done = self.told_running && self.restored && self.synced && self.served.is_some();
        done && (self.finished || !self.link)
    }

    /// Returns what can be told now, and was not.
    pub(super) fn untold(&self) -> Option<ToTell> {
        if !self.told_running {
            return (self.running && self.noted).then_some(ToTell::Running);
        }
        self.served.filter(|_| self.synced && self.led && !self.told_whole).map(ToTell::Whole)
    }

    /// It was told, as far as it can be.
    pub(super) fn told(&mut self, what: ToTell) {
        match what {
            ToTell::Running => self.told_running = true,
            ToTell::Whole(_) => self.told_whole = true,
        }
    }

    /// Returns what the source says now.
    ///
    /// # Errors
    /// What does not belong here: it counts for nothing.
    pub(super) fn hear(&mut self, message: &Message) -> Result<()> {
        match message {
            Message::Finished if self.told_whole => self.finished = true,
            // It has heard that over another link, too.
            Message::Commit => {}
            other => return Err(Phase::Running.refuse_message(other)),
        }
        Ok(())
    }

    /// Tells whether pages are missing that only the source has.
    pub(super) fn lacks(&self) -> bool {
        self.served.is_none() && self.left > 0
    }

    /// Tells whether nobody waits for the missing memory any more, and nobody brings it.
    pub(super) fn is_lost(&self) -> bool {
        !self.alive && !self.link && self.served.is_none()
    }

    /// Returns what becomes of the link when nothing has come for as long as anything may take: pages that are
    /// still on the source may take as long as they like.
    pub(super) fn after_silence(mut self) -> Outstanding {
        self.link &= self.lacks();
        self
    }

    /// Returns what is decided by, when somebody asks.
    pub(super) fn phase(&self) -> decide::CopyPhase {
        let running = self.running && self.noted;
        let whole = self.served.is_some() && self.synced;
        decide::CopyPhase::Started { running, whole, lacking: self.left > 0 }
    }

    /// Returns what an operator is told who wants it to end here, where it stays.
    pub(super) fn stays(&self) -> Standing {
        let runs = self.running && self.served.is_some();
        if runs { Standing::Running } else { Standing::Waiting }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that there is to wait for.
    const WAITED: [fn(&mut Outstanding); 5] = [
        |o| o.told_running = true,
        |o| o.restored = true,
        |o| o.synced = true,
        |o| o.served = Some(Served::default()),
        |o| o.finished = true,
    ];

    #[test]
    fn it_is_over_when_nothing_is_left() {
        for set in 0..1_u32 << WAITED.len() {
            let mut outstanding = Outstanding::new(true, false, 1);
            let set_bits = WAITED.iter().enumerate().filter(|(i, _)| set & (1 << i) != 0);
            set_bits.for_each(|(_, come_true)| come_true(&mut outstanding));
            assert_eq!(outstanding.is_over(), set == 0b11111, "{outstanding:?}");
            // Nobody is waited for who cannot be heard.
            outstanding.link = false;
            assert_eq!(outstanding.is_over(), set & 0b1111 == 0b1111, "{outstanding:?}");
        }
    }

    #[test]
    fn the_source_hears_first_that_it_runs_and_each_once() {
        let mut outstanding = Outstanding::new(true, false, 0);
        let served = Served::default();
        outstanding.served = Some(served);
        outstanding.synced = true;
        outstanding.running = true;
        assert_eq!(outstanding.untold(), None, "the disk does not know it");
        outstanding.noted = true;
        assert_eq!(outstanding.untold(), Some(ToTell::Running));
        outstanding.told_running = true;
        assert_eq!(outstanding.untold(), Some(ToTell::Whole(served)));
        outstanding.synced = false;
        assert_eq!(outstanding.untold(), None, "files are not on the disk");
        outstanding.synced = true;
        outstanding.led = false;
        assert_eq!(outstanding.untold(), None, "the source would no more send packets along");
        outstanding.led = true;
        outstanding.told_whole = true;
        assert_eq!(outstanding.untold(), None);
    }

    /// It may say that all is cleared away only when it has heard that it may.
    #[test]
    fn the_source_has_not_finished_before_all_is_here() {
        let mut outstanding = Outstanding::new(true, true, 0);
        assert!(outstanding.hear(&Message::Finished).is_err());
        assert!(!outstanding.finished);
        outstanding.told_whole = true;
        outstanding.hear(&Message::Finished).unwrap();
        assert!(outstanding.finished);
        assert!(outstanding.hear(&Message::Abort { why: "too late".into() }).is_err());
    }

    #[test]
    fn only_missing_pages_keep_a_silent_link() {
        let lacking = Outstanding::new(true, true, 5);
        assert!(lacking.after_silence().link);
        assert!(!Outstanding::new(true, true, 0).after_silence().link);
        let mut whole = lacking;
        whole.served = Some(Served::default());
        assert!(!whole.after_silence().link);
        assert!(!Outstanding::new(false, true, 5).after_silence().link, "it does not come back");
    }

    #[test]
    fn it_is_lost_without_tasks_link_and_memory() {
        let mut outstanding = Outstanding::new(false, true, 5);
        assert!(!outstanding.is_lost());
        outstanding.alive = false;
        assert!(outstanding.is_lost());
        outstanding.served = Some(Served::default());
        assert!(!outstanding.is_lost());
    }

    #[test]
    fn it_runs_for_others_when_the_disk_knows_it() {
        let mut outstanding = Outstanding::new(true, true, 5);
        outstanding.running = true;
        assert_eq!(outstanding.phase().standing(), Standing::Waiting);
        outstanding.noted = true;
        assert_eq!(outstanding.phase().standing(), Standing::Partial);
        assert_eq!(outstanding.stays(), Standing::Waiting);
        outstanding.served = Some(Served::default());
        assert_eq!(outstanding.phase().standing(), Standing::Running);
        assert_eq!(outstanding.stays(), Standing::Running);
    }
}
