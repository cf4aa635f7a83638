//! What a migration does about forwarding, on either side, and how that is undone: by the journal's
//! note alone, so that another process can do it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{
    AWAY, Away, NETWORK, away, control, directory, make_directory, process, remove_directory, write,
};
use crate::migration::journal::Record;
use crate::migration::journal::forward_role::{ForwardRecord, ForwardRole};
use crate::migration::protocol::Plan;
use crate::migration::protocol::forwarding::Ask;
use crate::network::{self, NetworkImage, Recreated, fence};
use crate::problem::Advise;
use crate::sys::fault;
use crate::sys::netns::{self, NetNs};
use crate::transport::connect::Destination;

/// Until the process that forwards has what comes for the container, and between two tries.
const LEAD_LIMIT: Duration = Duration::from_secs(5);
const LEAD_PAUSE: Duration = Duration::from_millis(50);

/// The source, before anything is touched: home must reach the destination.
///
/// # Errors
/// When it does not.
pub fn check(plan: &Plan, note: &ForwardRecord, destination: &Destination) -> Result<()> {
    if note.part != ForwardRole::MovesOn {
        return Ok(());
    }
    let home = plan.forward.from.as_ref().map_or("", |f| &f.1);
    control::ask(&directory(&note.id), &Ask::Probe(destination.clone())).advise(
        format!("{home} keeps the container's address and cannot forward it to {destination}"),
        format!(
            "`ssh {destination} true` must work there, without asking for anything; or end the \
             forwarding with --forward never"
        ),
    )
}

/// The source, before the freeze: where it is the container's home, a process that forwards. Whether
/// there has to be a link from home to the destination.
///
/// # Errors
/// When there can be none; what was made is noted, and undone with the rest.
pub fn establish(
    record: &Record,
    plan: &Plan,
    namespace: &NetNs,
    image: &NetworkImage,
) -> Result<bool> {
    let Some(note) = &record.forward else { return Ok(false) };
    match (note.part, &plan.engine) {
        (ForwardRole::Leaves, _) => {
            process::establish(&note.id, &record.container, namespace, image)?;
        }
        (ForwardRole::LeavesConnections, Some(wanted)) => {
            process::establish_published(&note.id, &record.container, wanted, image)?;
        }
        _ => {}
    }
    fault::point("forward.established")?;
    let away = [ForwardRole::Leaves, ForwardRole::MovesOn, ForwardRole::LeavesConnections];
    Ok(away.contains(&note.part))
}

/// The source, before the freeze: a link from home to the destination. Takes as long as that takes.
///
/// # Errors
/// When there is no such link.
pub fn join(record: &Record) -> Result<()> {
    let (Some(note), Some(to)) = (&record.forward, &record.destination) else { return Ok(()) };
    let ask = Ask::Join { destination: to.clone(), migration: record.migration.clone() };
    control::ask(&directory(&note.id), &ask).context("forwarding the container's address")?;
    fault::point("forward.joined")
}

/// The source, when the container runs there and its engine here does not know yet: from now on this host's
/// own translation, which the engine takes down, has nothing to do with its connections.
pub fn source_leads(record: &Record) {
    let Some(note) = &record.forward else { return };
    if note.part != ForwardRole::LeavesConnections {
        return;
    }
    let (directory, migration) = (directory(&note.id), record.migration.clone());
    let until = Instant::now() + LEAD_LIMIT;
    loop {
        let Err(e) = control::ask(&directory, &Ask::Switch { migration: migration.clone() }) else {
            return;
        };
        // One that has died is started again.
        if Instant::now() > until || !directory.exists() {
            return tracing::warn!("connections by this host are not forwarded: {e:#}");
        }
        std::thread::park_timeout(LEAD_PAUSE);
    }
}

/// The source, when the container runs there: frames go there, too. Everything that was sent here
/// before that has come by the time this returns, where it can be had at all.
pub fn source_goes(record: &Record) {
    let Some(note) = &record.forward else { return };
    let ask = match note.part {
        ForwardRole::Leaves | ForwardRole::MovesOn | ForwardRole::GoesHome => {
            Ask::Switch { migration: record.migration.clone() }
        }
        ForwardRole::Ends => Ask::End { dismantle: true },
        ForwardRole::Arrives
        | ForwardRole::ComesHome
        | ForwardRole::LeavesConnections
        | ForwardRole::ArrivesWithoutConnections => return,
    };
    // Home sees by itself where frames come from.
    if let Err(e) = control::ask(&directory(&note.id), &ask) {
        tracing::warn!("forwarding: {e:#}");
    }
}

/// The source, when what was frozen is gone: whether its network is kept here. It loses its name
/// then.
///
/// # Errors
/// When it cannot lose it.
pub fn source_gone(record: &Record) -> Result<bool> {
    let Some(note) = &record.forward else { return Ok(false) };
    let directory = directory(&note.id);
    if note.part == ForwardRole::LeavesConnections {
        return Ok(false);
    }
    if note.part != ForwardRole::Leaves {
        release(&directory);
        return Ok(false);
    }
    // Ended already, by the operator or because the container has.
    let Ok(kept) = NetNs::open(&directory.join(NETWORK)) else { return Ok(false) };
    if !fence::is_raised(&kept)? {
        fence::raise(&kept)?;
    }
    if let Some(path) = &record.network_path
        && NetNs::open(path).and_then(|n| n.identity()).ok() == kept.identity().ok()
    {
        netns::remove_named(path)?;
    }
    Ok(true)
}

/// The source, when the container stays here.
pub fn source_stays(record: &Record, was_committed: bool) {
    let Some(note) = &record.forward else { return };
    let directory = directory(&note.id);
    match note.part {
        ForwardRole::Leaves | ForwardRole::LeavesConnections => {
            let _ = control::ask(&directory, &Ask::End { dismantle: false });
            remove_directory(&directory);
        }
        ForwardRole::MovesOn | ForwardRole::GoesHome => {
            let migration = record.migration.clone();
            let _ = control::ask(&directory, &Ask::Leave { migration, claim: was_committed });
        }
        ForwardRole::Ends
        | ForwardRole::Arrives
        | ForwardRole::ComesHome
        | ForwardRole::ArrivesWithoutConnections => {}
    }
}

/// The destination, when its network is made: whoever holds the devices.
///
/// # Errors
/// When it cannot be started.
pub fn arrive(
    note: &ForwardRecord,
    plan: &Plan,
    made: &mut Recreated,
    image: &NetworkImage,
) -> Result<()> {
    let path = plan.network_path.clone().context("a network without a name")?;
    let links = image.outward().map(|(_, l)| (l.name.clone(), l.kind.clone())).collect();
    let directory = make_directory(&note.id)?;
    let home = plan.forward.from.as_ref().map_or(&plan.source, |f| &f.1).clone();
    let away = Away {
        id: note.id.clone(),
        container: plan.container.clone(),
        home,
        path,
        identity: made.namespace().identity()?,
        links,
        name: None,
        published: false,
        old: Vec::new(),
        stay: Vec::new(),
    };

    write(&directory, AWAY, &away)?;
    away::spawn(&directory, made.take_taps())
}

/// The destination, when the container comes home: its own namespace, under its own name.
///
/// # Errors
/// When it is not there any more, or cannot be filled.
pub fn come_home(id: &str, path: &Path, image: &NetworkImage) -> Result<Recreated> {
    let kept = NetNs::open(&directory(id).join(NETWORK)).context("the kept network")?;
    Ok(network::come_home(image, path, &kept)?)
}

/// The destination, when the fence is open: nobody forwards what comes for a container that is here.
pub fn open_destination(note: &ForwardRecord) {
    if note.part == ForwardRole::ComesHome
        && let Err(e) = control::ask(&directory(&note.id), &Ask::Local)
    {
        tracing::warn!("forwarding: {e:#}");
    }
}

/// The destination, when the container has settled here.
pub fn finish_destination(note: &ForwardRecord) {
    if note.part == ForwardRole::ComesHome {
        let directory = directory(&note.id);
        let _ = control::ask(&directory, &Ask::End { dismantle: false });
        remove_directory(&directory);
    }
}

/// The destination, when the container does not come: what was made for it. Whether its network was
/// here before, and stays.
pub fn discard_destination(note: &ForwardRecord) -> bool {
    let directory = directory(&note.id);
    match note.part {
        ForwardRole::Arrives | ForwardRole::ArrivesWithoutConnections => release(&directory),
        ForwardRole::ComesHome => {
            let _ = control::ask(&directory, &Ask::Abroad);
            return true;
        }
        _ => {}
    }
    false
}

/// Nobody holds devices any more.
fn release(directory: &Path) {
    let _ = control::ask(directory, &Ask::Quit);
    remove_directory(directory);
}
