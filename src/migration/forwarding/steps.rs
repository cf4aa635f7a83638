//! What a migration does about forwarding, on either side, and how that is undone: by the journal's
//! note alone, so that another process can do it.

use std::path::Path;

use anyhow::{Context, Result};

use super::{
    AWAY, Away, NETWORK, away, control, directory, make_directory, process, remove_directory, write,
};
use crate::migration::journal::Record;
use crate::migration::journal::part::{Note, Part};
use crate::migration::protocol::Plan;
use crate::migration::protocol::forwarding::Ask;
use crate::network::{self, NetworkImage, Recreated, fence};
use crate::problem::Advise;
use crate::sys::fault;
use crate::sys::netns::{self, NetNs};
use crate::transport::connect::Destination;

/// The source, before anything is touched: home must reach the destination.
///
/// # Errors
/// When it does not.
pub fn check(plan: &Plan, note: &Note, destination: &Destination) -> Result<()> {
    if note.part != Part::MovesOn {
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
pub fn establish(record: &Record, namespace: &NetNs, image: &NetworkImage) -> Result<bool> {
    let Some(note) = &record.forward else { return Ok(false) };
    if note.part == Part::Leaves {
        process::establish(&note.id, &record.container, namespace, image)?;
    }
    fault::point("forward.established")?;
    Ok(matches!(note.part, Part::Leaves | Part::MovesOn))
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

/// The source, when the container runs there: frames go there, too. Everything that was sent here
/// before that has come by the time this returns, where it can be had at all.
pub fn source_goes(record: &Record) {
    let Some(note) = &record.forward else { return };
    let ask = match note.part {
        Part::Leaves | Part::MovesOn | Part::GoesHome => {
            Ask::Switch { migration: record.migration.clone() }
        }
        Part::Ends => Ask::End { dismantle: true },
        Part::Arrives | Part::ComesHome => return,
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
    if note.part != Part::Leaves {
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
        Part::Leaves => {
            let _ = control::ask(&directory, &Ask::End { dismantle: false });
            remove_directory(&directory);
        }
        Part::MovesOn | Part::GoesHome => {
            let migration = record.migration.clone();
            let _ = control::ask(&directory, &Ask::Leave { migration, claim: was_committed });
        }
        Part::Ends | Part::Arrives | Part::ComesHome => {}
    }
}

/// The destination, when its network is made: whoever holds the devices.
///
/// # Errors
/// When it cannot be started.
pub fn arrive(note: &Note, plan: &Plan, made: &mut Recreated, image: &NetworkImage) -> Result<()> {
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
pub fn destination_opens(note: &Note) {
    if note.part == Part::ComesHome
        && let Err(e) = control::ask(&directory(&note.id), &Ask::Local)
    {
        tracing::warn!("forwarding: {e:#}");
    }
}

/// The destination, when the container has settled here.
pub fn destination_keeps(note: &Note) {
    if note.part == Part::ComesHome {
        let directory = directory(&note.id);
        let _ = control::ask(&directory, &Ask::End { dismantle: false });
        remove_directory(&directory);
    }
}

/// The destination, when the container does not come: what was made for it. Whether its network was
/// here before, and stays.
pub fn destination_discards(note: &Note) -> bool {
    let directory = directory(&note.id);
    match note.part {
        Part::Arrives => release(&directory),
        Part::ComesHome => {
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
