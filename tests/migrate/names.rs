//! Unix sockets whose files were renamed since they were bound, as haproxy does it, or linked, and their first
//! names removed, as supervisord does it.

use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::container::{Container, READY};
use crate::common::facts::{exactly_one_copy, pair};
use crate::common::lab::{Host, LONG, Lab};
use crate::common::suite::in_lab;
use crate::common::{Outcome, ensure};

const LIMIT: Duration = Duration::from_secs(90);

/// The suite.
pub fn trials() -> Vec<Trial> {
    vec![
        in_lab("names::on_shared_storage", LIMIT, |lab| to_and_fro(lab, "/srv/shared/box")),
        in_lab("names::of_copied_files", LIMIT, |lab| to_and_fro(lab, "/srv/local/box")),
    ]
}

/// Listens at five names, of which it renames two and links two, and says to each guest which one it is.
const SERVE: &str = r#"
use Socket;
my %doors;
for my $name ("/plain", "/service", "/run/service", "/linked", "/run/linked") {
    my $first = $name eq "/plain" ? $name : "$name.$$.tmp";
    socket(my $door, AF_UNIX, SOCK_STREAM, 0) or die;
    bind($door, sockaddr_un($first)) or die;
    chmod(0640, $first);
    listen($door, 8) or die;
    if ($name =~ /linked/) { link($first, $name) && unlink($first) or die }
    else { rename($first, $name) or die }
    $doors{$name} = $door;
}
"#;

const ANSWER: &str = r#"
while (1) {
    my $ears = '';
    vec($ears, fileno($_), 1) = 1 for values %doors;
    select($ears, undef, undef, undef);
    for my $name (keys %doors) {
        next unless vec($ears, fileno($doors{$name}), 1);
        accept(my $guest, $doors{$name}) or next;
        syswrite($guest, "$name\n");
    }
}
"#;

/// Each name leads to its socket, and nothing else is there.
fn answers(host: &Host) -> Outcome {
    let ask = r#"use Socket; for my $name ("/plain", "/service", "/run/service", "/linked", "/run/linked") {
        socket(my $s, AF_UNIX, SOCK_STREAM, 0); connect($s, sockaddr_un($name)) or die "$name: $!";
        print scalar <$s>; printf "%o\n", (stat $name)[2] & 07777 }
        print join(" ", sort map { s/[0-9]+/N/r } grep { /service|plain|linked|[.]ferry/ } glob("/run/* /run/.* /* /.*")), "\n";"#;
    let said = host.exec(&["ferry", "exec", "box", "perl", "-e", ask])?.exits(0)?.out;
    let wanted = "/plain\n640\n/service\n640\n/run/service\n640\n/linked\n640\n/run/linked\n640\n\
                  /linked /plain /run/linked /run/service /service\n";
    ensure!(said == wanted, "on {}: {said}", host.name);
    Ok(())
}

fn to_and_fro(lab: &Lab, bundle: &str) -> Outcome {
    let (a, b) = pair(lab);
    let container = Container::script(&format!("{SERVE} {READY} {ANSWER}")).at(bundle);
    container.start(lab, &a)?;
    answers(&a)?;
    for at in
        ["dump.frozen:error", "source.transfer:error", "source.commit:error", "source.commit:kill"]
    {
        let fault = format!("FERRY_FAULT={at}");
        let said = a.start(&["env", &fault, "ferry", "migrate", "box", "b"])?.end(LONG)?;
        ensure!(said.code != 0, "{at}: {said}");
        a.ferry(&["resolve", "--timeout", "60", "box"])?;
        exactly_one_copy(&container, &a, &b)?;
        answers(&a).map_err(|e| format!("after {at}: {e}"))?;
    }
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.ferry(&["check", "box", to.name])?.exits(0)?;
        from.ferry(&["migrate", "box", to.name])?.exits(0)?;
        exactly_one_copy(&container, to, from)?;
        answers(to)?;
    }
    Ok(())
}
