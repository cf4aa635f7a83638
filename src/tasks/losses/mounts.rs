//! Mounts that a checkpoint stumbles over.

use std::path::{Path, PathBuf};

use crate::problem::Problem;

/// Returns where file systems of this kind are mounted, in the text of proc_pid_mountinfo(5).
pub fn points(mountinfo: &str, kind: &str) -> Vec<String> {
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let place = left.split(' ').nth(4)?;
        (right.split(' ').next()? == kind).then(|| unescape(place))
    };
    mountinfo.lines().filter_map(line).collect()
}

/// Mounts of the host's whose propagation goes both ways: CRIU cannot tie them again. `bound` are the
/// bind mounts of the configuration.
pub fn shared(mountinfo: &str, bound: &[PathBuf]) -> Option<Problem> {
    let place = mountinfo.lines().find_map(|line| {
        let (left, _) = line.split_once(" - ")?;
        let mut fields = left.split(' ');
        let place = unescape(fields.nth(4)?);
        let tied = fields.skip(1).any(|option| option.starts_with("shared:"));
        let from_host = place == "/" || bound.iter().any(|bound| bound == Path::new(&place));
        (tied && from_host).then_some(place)
    })?;
    Some(
        Problem::new(
            format!("the mount {place} is shared with the host, both ways (rshared)"),
            "CRIU cannot tie it to the destination's",
        )
        .hint("bind it with rslave or rprivate in config.json"),
    )
}

/// Blanks and the like are written as octal numbers there.
pub(super) fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|code| u8::from_str_radix(code, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                text.push(char::from(code));
                text.push_str(&part[3..]);
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{Target, found};

    const INFO: &str = "\
        30 20 0:40 / / rw - overlay overlay rw\n\
        31 30 0:41 / /dev/mqueue rw,nosuid - mqueue mqueue rw\n\
        32 30 8:1 /data /with\\040blank rw shared:5 - ext4 /dev/vda rw\n\
        33 30 8:1 /data /slave rw master:5 - ext4 /dev/vda rw\n\
        34 30 0:50 / /own rw shared:9 - tmpfs tmpfs rw\n\
        35 30\n";

    #[test]
    fn only_what_is_shared_with_the_host_stands_in_the_way() {
        assert_eq!(points(INFO, "mqueue"), ["/dev/mqueue"]);
        let bound = |place: &str| [PathBuf::from(place)];
        assert!(shared(INFO, &bound("/with blank")).unwrap().what.contains("/with blank"));
        assert_eq!(shared(INFO, &bound("/slave")), None);
        assert_eq!(shared(INFO, &[]), None, "tied within the container");
        assert!(shared("30 20 0:40 / / rw shared:1 - overlay o rw", &[]).is_some());
        assert_eq!((&*unescape("a\\134\\9"), &*unescape("\\")), ("a\\\\9", "\\"));
    }

    #[test]
    fn fuzz_mounts_for_losses() {
        let target =
            Target::new("mounts-for-losses").sample(INFO).words(&[b"\\040", b" - ", b"shared:"]);
        target.run(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let points = points(&text, "mqueue");
            let bound: Vec<PathBuf> = points.into_iter().map(PathBuf::from).collect();
            found(&[bound.len(), shared(&text, &bound).map_or(0, |_| 1)])
        });
    }
}
