//! What the source says that it will copy, and what of it is here already.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

use super::{DestinationInput, DestinationInputs, LAYERS_LIMIT, SILENCE, engine};
use crate::files::layers::validate as validate_layers;
use crate::files::place::CopyTarget;
use crate::files::walk::Size;
use crate::migration::preflight::destination_checks;
use crate::migration::preflight::layers::{self, ComingOverlay};
use crate::migration::protocol::session::{FromPeer, PeerWriter};
use crate::migration::protocol::{self, Message, Plan};
use crate::problem::Problem;

/// Files that are to come.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// Where the trees go.
    pub(super) targets: Vec<CopyTarget>,
    /// What was announced of them; first of lacking layers.
    pub(super) sizes: Vec<Size>,
    /// The overlay that is mounted of some.
    pub(super) coming: Option<ComingOverlay>,
}

impl Incoming {
    pub(super) fn is_empty(&self) -> bool {
        self.targets.is_empty() && self.coming.is_none()
    }
}

/// What came of it when the source told what it has.
pub(super) enum Announced {
    Room(Box<Incoming>),
    Problems(Vec<Problem>),
    /// It changed its mind.
    Nothing,
}

/// Hears what there is to copy, looks for what is here already, and for room.
pub(super) fn announced(
    plan: &Plan,
    copies: &[usize],
    peer: &PeerWriter,
    inputs: &mut DestinationInputs,
    state_dir: &Path,
) -> Result<Announced> {
    let mut incoming = Incoming::default();
    let (mut staged, mut lacking) = (PathBuf::new(), 0);
    if let Some(overlay) = layers::wanted(plan, copies) {
        let all = match inputs.next(LAYERS_LIMIT) {
            Ok(DestinationInput::FromPeer(FromPeer::Message(Message::Layers { layers })))
                if layers.len() == overlay.lower.len() =>
            {
                layers
            }
            Ok(_) => bail!("the source does not follow the protocol"),
            Err(_) => return Ok(Announced::Nothing),
        };

        validate_layers(&all)?;
        let place = destination_checks::bundle_here(plan)?.0.rootfs()?;
        match ComingOverlay::plan(plan, overlay, &place, &all, state_dir) {
            Ok((coming, numbers)) => {
                (staged, lacking) = (coming.store().join("layer"), numbers.len());
                peer.send(&Message::Lacking { layers: numbers })?;
                incoming.coming = Some(coming);
            }
            Err(problem) => return Ok(Announced::Problems(vec![*problem])),
        }
    }

    incoming.targets = targets(plan, copies, incoming.coming.as_ref())?;
    if let Some(wanted) = &plan.engine {
        // Until the engine has made a place for it.
        let path = engine::upper(plan, wanted);
        incoming.targets.push(CopyTarget { path, own: true, single: false });
    }

    incoming.sizes = match inputs.next(SILENCE) {
        Ok(DestinationInput::FromPeer(FromPeer::Message(Message::Trees { sizes })))
            if sizes.len() == lacking + incoming.targets.len() =>
        {
            sizes
        }
        Ok(_) => bail!("the source does not follow the protocol"),
        Err(_) => return Ok(Announced::Nothing),
    };

    let places = std::iter::repeat_n(staged.as_path(), lacking);
    let places = places.chain(incoming.targets.iter().map(|t| t.path.as_path()));
    let problems = destination_checks::room_for(places.zip(&incoming.sizes))?;

    Ok(if problems.is_empty() {
        Announced::Room(Box::new(incoming))
    } else {
        Announced::Problems(problems)
    })
}

/// Returns where the trees go.
fn targets(
    plan: &Plan,
    copies: &[usize],
    coming: Option<&ComingOverlay>,
) -> Result<Vec<CopyTarget>> {
    let (here, _) = destination_checks::bundle_here(plan)?;
    let mut targets = Vec::new();
    for number in copies {
        let probe = &plan.probes[*number];
        let root = probe.place == protocol::Place::Rootfs;
        let path = match coming.filter(|_| root) {
            Some(coming) => coming.upper.as_ref().map(|u| u.path.clone()),
            None => {
                let path = probe.place.path(&here);
                Some(path.ok_or_else(|| anyhow!("config.json does not have {}", probe.what))?)
            }
        };
        targets.extend(path.map(|path| CopyTarget { path, own: root, single: probe.file }));
    }
    Ok(targets)
}
