//! Whether a migration holds a container on this host, in words. Advice that is right for a container
//! that is nobody else's (resume it, delete it, start it) makes a second copy of one that a migration
//! has frozen, or ends the only one: so whoever gives any asks here first.

use std::path::Path;

use super::away::AwayMark;
use super::{Journal, Record, Role, State};
use crate::problem::Problem;
use crate::report::log;

/// Returns what a migration has to do with a container here; nothing, where none is open.
pub fn in_the_way(state_dir: &Path, root: &Path, container: &str) -> Option<Problem> {
    let journals = match Journal::of(state_dir, root, container) {
        Ok(journals) => journals,
        Err(e) => return Some(unreadable(container, &e)),
    };
    let open = journals.into_iter().rfind(|journal| !journal.state().is_over())?;
    Some(problem(&open.record, open.state(), open.record.worker_lives()))
}

/// The same of one that leaves this host, or was to: the migration that brought a container here may
/// have its last words still to say while it runs.
pub fn leaves(state_dir: &Path, root: &Path, container: &str) -> Option<Problem> {
    let journals = match Journal::of(state_dir, root, container) {
        Ok(journals) => journals,
        Err(e) => return Some(unreadable(container, &e)),
    };
    let open =
        |journal: &Journal| journal.record.role == Role::Source && !journal.state().is_over();
    let open = journals.into_iter().rfind(open)?;
    Some(problem(&open.record, open.state(), open.record.worker_lives()))
}

fn unreadable(container: &str, error: &anyhow::Error) -> Problem {
    let (why, hints) = log::taken_apart(error);
    let what = format!("{}: it cannot be told whose {container} is", crate::sys::host::name());
    Problem::new(what, why).hint(hints.join("; "))
}

/// Returns what an open migration of a container has to do with it.
pub(super) fn problem(record: &Record, state: State, under_way: bool) -> Problem {
    let Record { container, peer, migration, worker, .. } = record;
    let (here, way) = match record.role {
        Role::Source => (crate::sys::host::name(), format!("to {peer}")),
        Role::Destination => (crate::sys::host::name(), format!("from {peer}")),
    };
    let asking = format!("on {here}: `ferry migrations {container}` tells how it stands");
    let resolving = format!("on {here}: `ferry resolve {container}`, and nothing else");

    match (record.role, state) {
        (Role::Destination, State::Ready) if under_way => Problem::new(
            format!("a copy of {container} is held on {here}"),
            format!("migration {migration} {way} waits for that host's word"),
        )
        .hint(format!("on {peer}, or {resolving}")),
        _ if under_way => Problem::new(
            format!("a migration of {container} is under way on {here}"),
            format!("migration {migration} {way}, by process {}", worker.pid),
        )
        .hint(asking),
        (Role::Source, State::Committed) => Problem::new(
            format!("{container} was handed over, and what is frozen on {here} must not run"),
            format!("migration {migration} {way} has not been told that it runs there"),
        )
        .hint(resolving),
        _ => Problem::new(
            format!("an earlier migration of {container} was broken off on {here}"),
            format!("migration {migration} {way} may have left it frozen, or a copy of it"),
        )
        .hint(resolving),
    }
}

/// Returns why a container that bears a mark is not to be started here, and what to do; how Ferry is called
/// for its root.
pub fn marked(state_dir: &Path, mark: &AwayMark, ferry: &str) -> (String, String) {
    let AwayMark { id, destination: to, migrated_at: at, migration_id: migration, .. } = mark;
    // It is written before anything is decided.
    let open = match Journal::find(state_dir, migration) {
        Ok(journal) => journal.is_some_and(|j| !j.state().is_over() && !handed_over(&j)),
        Err(_) => true,
    };
    if open {
        (
            format!("is in a migration to {to} that has been open since {at} ({migration})"),
            format!("`{ferry} resolve {id}` asks {to}, and settles whose it is"),
        )
    } else {
        (
            format!("was migrated to {to} on {at} (migration {migration})"),
            format!(
                "it runs there; if it must start afresh here because {to} is gone for good, say so \
                 first: `{ferry} resolve {id} --keep`"
            ),
        )
    }
}

fn handed_over(journal: &Journal) -> bool {
    matches!(journal.state(), State::Committed | State::Whole | State::Finished)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::journal::tests::record;

    /// Whatever a migration holds, nobody is told to resume, kill or delete it by hand.
    #[test]
    fn what_a_migration_holds_is_left_to_resolve() {
        let root = Path::new("/run/runc");
        for role in [Role::Source, Role::Destination] {
            for state in [State::Begun, State::Returning, State::Ready, State::Committed] {
                for alive in [true, false] {
                    let dir = tempfile::tempdir().unwrap();
                    let mut record = record("00112233aabbccdd");
                    record.role = role;
                    if !alive {
                        record.worker.started += 1;
                    }

                    let mut journal = Journal::create(dir.path(), record).unwrap();
                    journal.write(state).unwrap();
                    let problem = in_the_way(dir.path(), root, "web").unwrap();
                    assert!(problem.hint.contains("ferry "), "{problem}");
                    assert!(alive || problem.hint.contains("ferry resolve web"), "{problem}");
                    assert!(!problem.to_string().contains("runc"), "{problem}");
                    assert!(in_the_way(dir.path(), root, "web2").is_none());
                    assert!(in_the_way(dir.path(), Path::new("/other"), "web").is_none());
                    assert_eq!(leaves(dir.path(), root, "web").is_some(), role == Role::Source);
                    journal.write(State::Aborted).unwrap();
                    assert!(in_the_way(dir.path(), root, "web").is_none());
                }
            }
        }
    }

    #[test]
    fn a_mark_says_what_is_so() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), record("00112233aabbccdd")).unwrap();
        let mark = AwayMark {
            id: "web".parse().unwrap(),
            runtime_root: "/run/runc".into(),
            destination: "host2".into(),
            migrated_at: "2026-03-01T12:00:00Z".into(),
            migration_id: "00112233aabbccdd".into(),
            named: None,
        };
        let (why, hint) = marked(dir.path(), &mark, "ferry");
        assert!(why.contains("open") && !why.contains("was migrated"), "{why}");
        assert!(!hint.contains("--keep"), "{hint}");
        journal.write(State::Committed).unwrap();
        let (why, _) = marked(dir.path(), &mark, "ferry");
        assert!(why.contains("was migrated to host2"), "{why}");
        // The journal may have been cleared away since.
        std::fs::remove_file(journal.path()).unwrap();
        assert_eq!(marked(dir.path(), &mark, "ferry").0, why);
    }
}
