//! The cipher by which ssh carries memory.
//!
//! Everything that is migrated is enciphered, and on most links that is what takes longest. ssh by itself
//! takes chacha20-poly1305; where the processor has instructions for AES, AES-GCM costs less than two thirds of
//! that. So it is asked for first, and all others stay as they are. Whoever has set the list keeps theirs.

use std::path::Path;
use std::process::{Command, Stdio};

/// What is asked for first.
const QUICKEST: &str = "aes128-gcm@openssh.com";

/// Returns what to tell a remote shell beyond its own arguments: nothing where it is not ssh, or has been told
/// which ciphers to use, on its command line or in its configuration.
pub fn arguments(program: &str, first: &[String], host: &str, port: Option<u16>) -> Vec<String> {
    if Path::new(program).file_name().is_none_or(|name| name != "ssh") || !has_aes() {
        return Vec::new();
    }
    let mut as_told = Command::new(program);
    as_told.arg("-G").args(first);
    if let Some(port) = port {
        as_told.arg("-p").arg(port.to_string());
    }
    as_told.arg(host);
    let mut untold = Command::new(program);
    untold.args(["-G", "-F", "none", "-o", "CanonicalizeHostname=no", "localhost"]);
    let order =
        said(as_told).zip(said(untold)).and_then(|(now, usual)| quickest_first(&now, &usual));
    order.map_or(Vec::new(), |list| vec!["-o".into(), format!("Ciphers={list}")])
}

/// Of this processor. The destination's must have all that this one has.
fn has_aes() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut flags =
        text.lines().filter(|line| line.starts_with("flags") || line.starts_with("Features"));
    flags.next().is_some_and(|line| line.split_ascii_whitespace().any(|flag| flag == "aes"))
}

/// ssh(1), `-G`: its configuration as it would be used.
fn said(mut command: Command) -> Option<String> {
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

/// The list of ciphers with the quickest in front, where it is the usual one and has it somewhere else.
fn quickest_first(now: &str, usual: &str) -> Option<String> {
    fn list(text: &str) -> Option<&str> {
        text.lines().find_map(|line| line.strip_prefix("ciphers "))
    }
    let now = list(now)?;
    let mut others: Vec<&str> = now.split(',').collect();
    let place = others.iter().position(|one| *one == QUICKEST)?;
    if Some(now) != list(usual) || place == 0 {
        return None;
    }
    others.remove(place);
    others.insert(0, QUICKEST);
    Some(others.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: &str = "host x\nciphers chacha20-poly1305@openssh.com,aes128-ctr,aes128-gcm@openssh.com\nport 22\n";

    #[test]
    fn only_the_usual_list_is_changed() {
        let list = "aes128-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr";
        assert_eq!(quickest_first(USUAL, USUAL).as_deref(), Some(list));
        let others = |ciphers: &str| format!("ciphers {ciphers}\n");
        for now in [
            others("aes128-ctr"),
            others("chacha20-poly1305@openssh.com"),
            others("aes128-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr"),
            "port 22\n".into(),
            String::new(),
        ] {
            assert_eq!(quickest_first(&now, USUAL), None, "{now}");
        }
        let first = others("aes128-gcm@openssh.com,aes128-ctr");
        assert_eq!(quickest_first(&first, &first), None);
        let without = others("aes128-ctr,aes256-ctr");
        assert_eq!(quickest_first(&without, &without), None);
    }

    #[test]
    fn another_shell_is_told_nothing() {
        assert!(arguments("rsh", &[], "h", None).is_empty());
        assert!(arguments("/no/such/ssh", &[], "h", None).is_empty());
    }
}
