//! The bundle's config.json, as far as the hand-over needs to read it.
//!
//! Read with `serde_json::Value`: a round trip through typed structures would drop fields that
//! they do not know.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A mount of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleMount {
    /// Where in the container.
    pub destination: PathBuf,
    /// File system type, `bind` for bind mounts.
    pub kind: String,
    /// For bind mounts: the path on the host, absolute.
    pub source: PathBuf,
    /// Whether the container may write there.
    pub read_only: bool,
}

/// A bundle on this host.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Its directory.
    pub path: PathBuf,
    /// The configuration as it stands in the file.
    pub config: Value,
}

impl Bundle {
    /// Reads `path/config.json`.
    ///
    /// # Errors
    /// When it is not there or not JSON.
    pub fn load(path: &Path) -> Result<Bundle> {
        let file = path.join("config.json");
        let bytes =
            std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let config = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not valid JSON", file.display()))?;
        Ok(Bundle { path: path.to_owned(), config })
    }

    /// The root file system, absolute.
    ///
    /// # Errors
    /// When the configuration names none.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let path = self.config["root"]["path"]
            .as_str()
            .ok_or_else(|| anyhow!("config.json names no root.path"))?;
        Ok(self.path.join(path))
    }

    /// Tells whether the root file system is mounted read-only.
    pub fn rootfs_read_only(&self) -> bool {
        self.config["root"]["readonly"].as_bool().unwrap_or(false)
    }

    /// Tells whether the container's standard streams are a terminal.
    pub fn terminal(&self) -> bool {
        self.config["process"]["terminal"].as_bool().unwrap_or(false)
    }

    /// The bind mounts.
    pub fn bind_mounts(&self) -> Vec<BundleMount> {
        let none = Vec::new();
        let mounts = self.config["mounts"].as_array().unwrap_or(&none);
        mounts
            .iter()
            .filter_map(|m| {
                let options: Vec<&str> = m["options"]
                    .as_array()
                    .map(|o| o.iter().filter_map(Value::as_str).collect())
                    .unwrap_or_default();
                let bind = m["type"].as_str() == Some("bind")
                    || options.iter().any(|o| *o == "bind" || *o == "rbind");
                bind.then(|| BundleMount {
                    destination: m["destination"].as_str().unwrap_or_default().into(),
                    kind: "bind".into(),
                    source: self.path.join(m["source"].as_str().unwrap_or_default()),
                    read_only: options.contains(&"ro"),
                })
            })
            .collect()
    }

    /// Returns what the container is not to see: the runtime binds its `/dev/null` over files, and an empty
    /// tmpfs over directories.
    pub fn masked_paths(&self) -> Vec<String> {
        let list = self.config["linux"]["maskedPaths"].as_array();
        list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The path of a namespace that the container joins instead of making its own; `Some(None)`
    /// for one of its own, `None` where it shares the host's.
    pub fn namespace(&self, kind: &str) -> Option<Option<PathBuf>> {
        let list = self.config["linux"]["namespaces"].as_array()?;
        let entry = list.iter().find(|n| n["type"].as_str() == Some(kind))?;
        Some(entry["path"].as_str().filter(|p| !p.is_empty()).map(PathBuf::from))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_parts_that_matter_are_found() {
        let bundle = Bundle {
            path: "/b".into(),
            config: json!({
                "root": {"path": "rootfs", "readonly": true},
                "mounts": [
                    {"destination": "/proc", "type": "proc", "source": "proc"},
                    {"destination": "/www", "source": "www", "options": ["rbind", "ro"]},
                    {"destination": "/d", "type": "bind", "source": "/data"}
                ],
                "linux": {"namespaces": [
                    {"type": "network", "path": "/run/netns/web"}, {"type": "pid"}
                ]}
            }),
        };

        assert_eq!(bundle.rootfs().unwrap(), Path::new("/b/rootfs"));
        assert!(bundle.rootfs_read_only() && !bundle.terminal());
        let mounts = bundle.bind_mounts();
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[0].source.to_str(), mounts[0].read_only), (Some("/b/www"), true));
        assert_eq!((mounts[1].source.to_str(), mounts[1].read_only), (Some("/data"), false));
        assert_eq!(bundle.namespace("network"), Some(Some("/run/netns/web".into())));
        assert_eq!(bundle.namespace("pid"), Some(None));
        assert_eq!(bundle.namespace("user"), None);
    }
}
