//! What the hosts tell each other about forwarding a container's address.

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::network::translated::{self, Translated};
use crate::transport::connect::Destination;

/// `--forward`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ForwardOption {
    /// Where the address belongs to no network of the destination's.
    #[default]
    Auto,
    /// Wherever it goes, but home.
    Always,
    /// The address moves.
    Never,
}

/// What the destination hears of it before anything is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRequest {
    /// What the user wants.
    pub wish: ForwardOption,
    /// The forwarding that the container is reached by now, and the name of its home.
    pub from: Option<(String, String)>,
    /// What depends on the host that has the address: it goes nowhere.
    pub translated: Translated,
}

impl ForwardRequest {
    /// Refuses what no honest source sends.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn validate(&self) -> Result<()> {
        match &self.from {
            _ if self.translated.flows.len() > translated::MOST => bail!("too many connections"),
            Some((id, _)) if !is_id(id) => bail!("{id:?} is no forwarding's ID"),
            Some((_, home)) if home.len() > 64 || home.contains(char::is_control) => {
                bail!("{home:?} is no host's name")
            }
            _ => Ok(()),
        }
    }
}

/// Tells whether this can be a forwarding's ID: it becomes a directory's name.
pub fn is_id(id: &str) -> bool {
    id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What becomes of the address, as the destination decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressDecision {
    /// It moves there.
    #[default]
    Moves,
    /// It stays where it is.
    Stays,
    /// It is there already: the container comes home.
    Home,
    /// It moves; connections that live by the translation of where it was are forwarded from there.
    Published,
}

/// A word about forwarding.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForwardMessage {
    /// To the host that has the container, instead of a plan: this link is to carry its frames.
    Carry {
        /// The forwarding's ID.
        id: String,
        /// Names of the links, in the order by which frames tell them.
        links: Vec<String>,
    },
    /// To home: it does.
    Carried,
    /// From home: nothing is forwarded any more.
    Over,
    /// Both ways: whoever says it does. A remote shell whose host is gone tells nobody for a quarter of
    /// an hour.
    Alive {
        /// To home: the container's open connections, where they are known.
        connections: Option<u32>,
    },
    /// To home.
    Ask {
        /// Which one, to find its answer.
        number: u64,
        /// The question.
        ask: Ask,
    },
    /// From home.
    Answer {
        /// To which one.
        number: u64,
        /// What home says to it.
        answer: ForwardAnswer,
    },
}

/// What is asked of the process at home, or, over the link, of it by the one that is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// How does it go?
    Status,
    /// Can home reach this host?
    Probe(Destination),
    /// The container may go there: connect, and listen for it.
    Join {
        /// Host to reach.
        destination: Destination,
        /// The migration that takes it there.
        migration: String,
    },
    /// It has been handed over there.
    Switch {
        /// The migration that took it there.
        migration: String,
    },
    /// It stayed where it was.
    Leave {
        /// The migration that was given up.
        migration: String,
        /// It had been handed over already.
        claim: bool,
    },
    /// It is at home, and reached without us.
    Local,
    /// It is not, after all.
    Abroad,
    /// What ties the container to this host?
    Translated,
    /// It is over when the container had no connection for so long, seconds.
    EndWhenIdle(u64),
    /// It is over.
    End {
        /// What was kept of the container's network goes, too.
        dismantle: bool,
    },
    /// Only to the process that holds the devices: let go.
    Quit,
    /// The same: a link from home, whose links have these names.
    Link(Vec<String>),
}

/// The answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ForwardAnswer {
    /// Reason, in words.
    pub error: Option<String>,
    /// To [`Ask::Status`].
    pub status: Option<Status>,
    /// To [`Ask::Translated`].
    pub translated: Option<Translated>,
}

impl From<Result<()>> for ForwardAnswer {
    fn from(result: Result<()>) -> ForwardAnswer {
        ForwardAnswer { error: result.err().map(|e| format!("{e:#}")), ..ForwardAnswer::default() }
    }
}

impl ForwardAnswer {
    /// Returns what it says as a result.
    ///
    /// # Errors
    /// When it tells of one.
    pub fn into_result(self) -> Result<()> {
        self.error.map_or(Ok(()), |e| Err(anyhow!(e)))
    }
}

/// How it goes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Where the frames go: a host.
    pub to: String,
    /// Since when, unix time.
    pub since: u64,
    /// Bytes of frames that went to the other host.
    pub out_bytes: u64,
    /// Bytes of frames that came from there.
    pub in_bytes: u64,
    /// Open connections of the container's, where they are known.
    pub connections: Option<u32>,
    /// It ends when there was none for so long, seconds.
    pub until_idle: Option<u64>,
    /// The link to it works.
    pub connected: bool,
    /// Reason, in words.
    pub why: String,
}
