//! Containers in a lab, made of the workloads in `bundles/`.

use std::process::Command;

use super::Outcome;
use super::lab::{Host, Lab, SHORT, in_tree};
use super::process::{run, until};

/// A container to be.
#[derive(Clone)]
pub struct Container {
    /// Its ID.
    pub id: &'static str,
    /// The workload.
    pub workload: &'static str,
    /// Its bundle.
    pub bundle: String,
    /// Whether it has an address of its own.
    pub networked: bool,
    options: Vec<String>,
}

/// A program's last line before it waits: it leaves `$said` in a file.
pub const READY: &str =
    r#"open(my $to, ">", "/new"); print $to $said // ""; close($to); rename("/new", "/ready");"#;

/// The last byte of the container's address.
pub const ADDRESS: u8 = 50;

impl Container {
    /// A container without a network, with its bundle on shared storage.
    pub fn plain(workload: &'static str) -> Container {
        Container {
            id: "box",
            workload,
            bundle: "/srv/shared/box".into(),
            networked: false,
            options: Vec::new(),
        }
    }

    /// One with an address in the hosts' network.
    pub fn networked(workload: &'static str) -> Container {
        let options = vec!["--netns".into(), "/run/netns/box".into()];
        Container { networked: true, options, ..Container::plain(workload) }
    }

    /// With more options of `bundles/make`.
    pub fn with(mut self, options: &[&str]) -> Container {
        self.options.extend(options.iter().map(|o| (*o).to_owned()));
        self
    }

    /// With its bundle at another place.
    pub fn at(mut self, bundle: &str) -> Container {
        bundle.clone_into(&mut self.bundle);
        self
    }

    /// Writes the bundle.
    pub fn make(&self, host: &Host) -> Outcome {
        let mut command = Command::new(in_tree("bundles/make"));
        command.args(&self.options).arg(self.workload).arg(host.path(&self.bundle)?);
        run(&mut command, SHORT)?.ok().map(drop)
    }

    /// Makes its network, where it has one.
    pub fn make_network(&self, lab: &Lab, host: &Host) -> Outcome {
        if self.networked {
            let address = lab.address(ADDRESS);
            host.sh(&format!(
                "ip netns add box
                 ip link add link eth0 name box0 netns box type macvlan mode bridge
                 ip -n box link set lo up
                 ip -n box addr add {address}/24 dev box0
                 ip -n box link set box0 up"
            ))?;
        }
        Ok(())
    }

    /// Makes everything, and starts it with its standard streams on `/dev/null`.
    pub fn start(&self, lab: &Lab, host: &Host) -> Outcome {
        self.make(host)?;
        self.make_network(lab, host)?;
        self.run_on(host)
    }

    /// Starts what has been made.
    pub fn run_on(&self, host: &Host) -> Outcome {
        host.sh(&format!(
            "ferry --log /tmp/run.log run -d --bundle {} {} </dev/null >/dev/null 2>&1 || {{ cat /tmp/run.log >&2; exit 1; }}",
            self.bundle, self.id
        ))?;
        self.await_server(host)
    }

    /// Waits until its server listens, where it has one.
    fn await_server(&self, host: &Host) -> Outcome {
        let port = match self.workload {
            "web" => 80,
            "crowd" => 7102,
            _ => 7000,
        };
        // In state LISTEN.
        let look = format!(
            "pid=$(runc state {} | grep -o '\"pid\": [0-9]*' | grep -o '[0-9]*')
             grep -qE ':{port:04X} 0+:0000 0A' /proc/$pid/net/tcp /proc/$pid/net/tcp6",
            self.id
        );
        if self.workload == "script" {
            return self.await_script(host);
        }
        if matches!(self.workload, "stdio" | "echo" | "hostile" | "mappings" | "sleepers") {
            return Ok(());
        }
        until("the server listens", SHORT, || {
            Ok((host.exec(&["sh", "-c", &look])?.code == 0).then_some(()))
        })
    }

    /// A program in Perl, whose last line of preparations is [`READY`].
    pub fn script(program: &str) -> Container {
        Container::plain("script").with(&["--arg", program])
    }

    /// Waits until the program has said what it found.
    fn await_script(&self, host: &Host) -> Outcome {
        let look = format!("test -e {}/rootfs/ready", self.bundle);
        until("the program is ready", SHORT, || {
            Ok((host.exec(&["sh", "-c", &look])?.code == 0).then_some(()))
        })
    }

    /// Where its server answers.
    pub fn server(&self, lab: &Lab) -> String {
        format!("{}:7000", lab.address(ADDRESS))
    }
}
