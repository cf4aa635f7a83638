//! What goes over the client's wire: nothing may tell it that a connection is over.

use std::time::Duration;

use super::lab::{Host, Lab, SHORT};
use super::process::{Running, until};
use super::{Outcome, ensure};

/// Connections to containers, and to other servers that a trial has at port 7001, that begin (seen, or nothing was watched); RST and FIN of them, ICMP's unreachable.
const BEGINS: &str = "(tcp[13] & 18 = 18) or (ip6[6] = 6 and ip6[53] & 18 = 18)";
const BREAKS: &str = "(portrange 7000-7001 and (tcp[13] & 5 != 0 or (ip6[6] = 6 and ip6[53] & 5 != 0))) \
                      or (icmp[0] = 3) or (ip6[6] = 58 and ip6[40] = 1)";

/// A capture on the client.
pub struct Wire {
    client: Host,
    file: String,
    _capture: Running,
}

impl Wire {
    /// Watches from now on.
    pub fn watch(lab: &Lab) -> Outcome<Wire> {
        Wire::watch_on(lab, "eth0")
    }

    /// The same on another interface.
    pub fn watch_on(lab: &Lab, interface: &str) -> Outcome<Wire> {
        let client = lab.host("client");
        let file = format!("/srv/shared/{interface}.pcap");
        client.sh(&format!("rm -f {file}"))?;
        let filter = format!("{BEGINS} or {BREAKS}");
        let capture = client.start(&[
            "tcpdump",
            "-i",
            interface,
            "-n",
            "-U",
            "--immediate-mode",
            // Thousands of connections may begin in a moment.
            "-s",
            "128",
            "-B",
            "8192",
            "-Z",
            "root",
            "-w",
            &file,
            &filter,
        ])?;

        let path = client.path(&file)?;
        until("the capture is on", SHORT, || {
            Ok(path.metadata().is_ok_and(|m| m.len() >= 24).then_some(()))
        })?;

        Ok(Wire { client, file, _capture: capture })
    }

    fn lines(&self, filter: &str) -> Outcome<Vec<String>> {
        let said = self.client.exec(&["tcpdump", "-n", "-r", &self.file, filter])?;
        Ok(said.out.lines().map(str::to_owned).collect())
    }

    /// At least so many connections began, and none was broken off.
    pub fn is_calm(&self, connections: usize) -> Outcome {
        until("all that was seen is written", Duration::from_secs(5), || {
            Ok((self.lines(BEGINS)?.len() >= connections).then_some(()))
        })?;
        let seen = self.lines(BREAKS)?;
        let broken: Vec<_> = (0..seen.len()).filter(|i| !is_answer(&seen, *i)).collect();
        let broken: Vec<&str> = broken.into_iter().map(|i| seen[i].as_str()).collect();
        ensure!(broken.is_empty(), "on the wire: {}", broken.join("\n"));
        Ok(())
    }
}

/// A FIN of the client's own, or the answer to one: the probe has questions on which it hangs up.
fn is_answer(seen: &[String], at: usize) -> bool {
    let ends = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let fin = words.get(6).is_some_and(|flags| flags.starts_with("[F"));
        let (from, to) = (words.get(2)?, words.get(4)?.trim_end_matches(':'));
        fin.then(|| ((*from).to_owned(), to.to_owned()))
    };
    let Some((from, to)) = ends(&seen[at]) else { return false };
    let own = to.ends_with(".7000") || to.ends_with(".7001");
    own || seen[..at].iter().any(|line| ends(line) == Some((to.clone(), from.clone())))
}
