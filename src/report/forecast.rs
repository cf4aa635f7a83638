//! What `--dry-run` tells: what would be copied, and about how long that takes.

use serde::Serialize;

use crate::files::walk::Size;

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// Bytes that the link carries in a second.
    pub link_bytes_per_s: f64,
    /// Addresses of the host that would move, a line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Root file system and bind mounts.
    pub files: Vec<TreeForecast>,
    /// Bytes of the container's memory, without what it shares with files.
    pub memory_bytes: u64,
    /// Seconds that these take, copied once.
    pub memory_s: f64,
}

/// What becomes of one of the container's trees.
#[derive(Clone, Debug, Serialize)]
pub struct TreeForecast {
    /// `root file system`, `bind mount /srv/www`.
    pub what: String,
    /// What is copied; otherwise it is there.
    #[serde(flatten)]
    pub copied: Option<Size>,
    /// Seconds that it takes, copied once.
    pub copy_s: f64,
}

impl Forecast {
    /// In words, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let about = |seconds: f64| match seconds {
            s if s < 1.0 => "less than a second".to_owned(),
            s if s < 120.0 => format!("about {s:.0} s"),
            s => format!("about {:.0} min", s / 60.0),
        };

        let mut lines = self.addresses.clone();
        for tree in &self.files {
            lines.push(match &tree.copied {
                None => format!("{}: is there", tree.what),
                Some(size) => format!(
                    "{}: copied, {} MiB, {} files, {}",
                    tree.what,
                    mib(size.bytes),
                    size.entries,
                    about(tree.copy_s)
                ),
            });
        }

        lines.push(format!("memory: {} MiB, {}", mib(self.memory_bytes), about(self.memory_s)));
        lines.push(format!(
            "the link carries {:.0} MB/s now; the container runs on meanwhile, all but a moment",
            self.link_bytes_per_s / 1e6
        ));

        lines
    }
}
