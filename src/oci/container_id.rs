//! What the runtime calls a container.

use std::ffi::OsStr;
use std::fmt;
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt;
use std::str::FromStr;

use anyhow::{Error, bail};
use serde::{Deserialize, Serialize};

/// A container's ID, which [`valid_id`] accepts: it comes from outside at a command line, over a link or
/// out of a file, and is checked there. It can be a file's name and an argument as it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ContainerId(String);

/// Tells whether this can be a container's ID: runc's rule, which leaves no room for paths.
pub fn valid_id(id: &OsStr) -> bool {
    let bytes = id.as_bytes();
    !matches!(bytes, b"" | b"." | b"..")
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"_+.-".contains(b))
}

impl TryFrom<String> for ContainerId {
    type Error = Error;

    fn try_from(id: String) -> Result<ContainerId, Error> {
        if !valid_id(id.as_ref()) {
            bail!("{id:?} is no container's ID");
        }
        Ok(ContainerId(id))
    }
}

impl FromStr for ContainerId {
    type Err = Error;

    fn from_str(id: &str) -> Result<ContainerId, Error> {
        id.to_owned().try_into()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

impl Deref for ContainerId {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<OsStr> for ContainerId {
    fn as_ref(&self) -> &OsStr {
        self.0.as_ref()
    }
}

impl PartialEq<str> for ContainerId {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_be_a_path_is_no_id() {
        for id in ["web", "a_B+c.9-", "..."] {
            assert_eq!(&*id.parse::<ContainerId>().unwrap(), id);
        }
        for bad in ["", ".", "..", "a/b", "a b", "a\n", "ä"] {
            bad.parse::<ContainerId>().unwrap_err();
            let json = serde_json::to_string(bad).unwrap();
            serde_json::from_str::<ContainerId>(&json).unwrap_err();
        }
        assert_eq!(serde_json::to_string(&ContainerId("web".into())).unwrap(), "\"web\"");
        assert!(!valid_id(OsStr::from_bytes(b"\xff")));
    }
}
