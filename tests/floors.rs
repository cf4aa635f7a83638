//! The floor plan: a room imports only rooms of lower floors. The plan is the table in the head of
//! `src/lib.rs`, and for the rooms of `migration` the one in `src/migration/mod.rs`; what is imported is
//! read from the sources. And a name stands for one type in the whole house.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Rooms and their floors.
type Plan = BTreeMap<String, u32>;

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Reads the table of a module's head: a floor's number, the rooms on it, and what they are for, with two
/// spaces between.
fn plan(file: &Path) -> Plan {
    let text = fs::read_to_string(file).expect("a module");
    let mut plan = Plan::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("//!")) {
        let mut columns = line.split("  ").map(str::trim).filter(|column| !column.is_empty());
        let Some(Ok(floor)) = columns.next().map(str::parse) else { continue };
        for room in columns.next().unwrap_or_default().split(' ') {
            assert_eq!(plan.insert(room.to_owned(), floor), None, "{room} is there twice");
        }
    }
    assert!(plan.len() > 5, "{} has no table of floors", file.display());
    plan
}

/// All files of a room, with the module that each is.
fn modules(directory: &Path, module: &[String], found: &mut Vec<(Vec<String>, PathBuf)>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let own = match name.as_str() {
            "mod" | "lib" | "main" => module.to_vec(),
            _ => [module, &[name]].concat(),
        };
        if path.is_dir() {
            modules(&path, &own, found);
        } else {
            found.push((own, path));
        }
    }
}

/// The code of a file: no comments, and nothing that only tests see.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Every path that a file names from the crate's root on, as far as its groups of braces allow it to be
/// told: `crate::a::{b, c::d}` names `a::b` and `a::c::d`.
fn imports(module: &[String], text: &str) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    for start in ["crate::", "super::"] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '$')) {
                continue;
            }
            let mut base = Vec::new();
            let mut rest = &text[at..];
            if let Some(after) = rest.strip_prefix("crate::") {
                rest = after;
            } else {
                base = module.to_vec();
                while let Some(after) = rest.strip_prefix("super::") {
                    base.pop();
                    rest = after;
                }
            }
            follow(&base, rest, &mut found);
        }
    }
    found
}

/// Notes the paths that begin here, and returns what comes after them.
fn follow<'a>(base: &[String], text: &'a str, found: &mut BTreeSet<Vec<String>>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = follow(base, rest, found).trim_start();
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => return rest.strip_prefix('}').unwrap_or(rest),
            }
        }
    }

    let length = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (word, rest) = text.split_at(length);
    let mut path = base.to_vec();
    if !word.is_empty() && word != "self" {
        path.push(word.to_owned());
    }

    match rest.strip_prefix("::") {
        Some(rest) if !word.is_empty() => follow(&path, rest, found),
        _ => {
            found.insert(path);
            // `as NAME`
            match rest.trim_start().strip_prefix("as ") {
                Some(rest) => {
                    rest.trim_start().trim_start_matches(|c: char| c.is_alphanumeric() || c == '_')
                }
                None => rest,
            }
        }
    }
}

/// Arrows that do not lead downwards, between the rooms of a plan that lie in the module `above`.
fn wrong_arrows(plan: &Plan, above: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    modules(&source(), &[], &mut all);
    let room = |module: &[String]| {
        let name = module.strip_prefix(above)?.first()?;
        plan.get(name).map(|floor| (name.clone(), *floor))
    };

    let mut wrong = Vec::new();
    for (module, path) in &all {
        let inside = module.strip_prefix(above).and_then(|rest| rest.first());
        let Some(own) = inside else { continue };
        let Some(floor) = plan.get(own) else {
            wrong.push(format!("{own} has no floor"));
            continue;
        };

        for import in imports(module, &code(path)) {
            if let Some((other, below)) = room(&import)
                && other != *own
                && below >= *floor
            {
                let name = path.strip_prefix(source()).unwrap_or(path).display().to_string();
                wrong.push(format!("{name}: {own} ({floor}) imports {}", import.join("::")));
            }
        }
    }

    wrong
}

/// Modules that only tests see: a file declares each behind `#[cfg(test)]`.
fn only_in_tests(all: &[(Vec<String>, PathBuf)]) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    for (module, path) in all {
        let text = fs::read_to_string(path).expect("a source file");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for pair in lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]") {
            let declared = pair[1].strip_suffix(';').and_then(|rest| rest.rsplit_once("mod "));
            found.extend(declared.map(|(_, name)| [&module[..], &[name.to_owned()]].concat()));
        }
    }
    found
}

/// The type that a line of code defines.
fn defined(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
    match words.next()? {
        "struct" | "enum" | "trait" | "union" => {}
        // Indented, it belongs to a trait or to an implementation of one.
        "type" if !line.starts_with(' ') => {}
        _ => return None,
    }
    let name = words.next()?;
    name.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

#[test]
fn no_two_types_have_one_name() {
    let mut all = Vec::new();
    modules(&source(), &[], &mut all);
    let tests = only_in_tests(&all);
    let seen = |module: &[String]| (0..=module.len()).all(|n| !tests.contains(&module[..n]));

    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (module, path) in all.iter().filter(|(module, _)| seen(module)) {
        for name in code(path).lines().filter_map(defined) {
            types.entry(name.to_owned()).or_default().push(module.join("::"));
        }
    }
    assert!(types.len() > 300, "only {} types were found", types.len());

    types.retain(|_, places| places.len() > 1);
    assert!(types.is_empty(), "{types:#?}");
}

#[test]
fn every_room_imports_lower_floors_only() {
    let wrong = wrong_arrows(&plan(&source().join("lib.rs")), &[]);
    assert!(wrong.is_empty(), "{} arrows:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn so_do_the_rooms_of_the_migration() {
    let wrong = wrong_arrows(&plan(&source().join("migration/mod.rs")), &["migration".to_owned()]);
    assert!(wrong.is_empty(), "{} arrows:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn paths_are_read_from_groups_and_from_relative_ones() {
    let module = ["a", "b", "c"].map(str::to_owned);
    let text = "use crate::x::{self, y as z, v::{w, u}};\nfn f() { super::super::k::g(); }";
    let found: Vec<String> = imports(&module, text).iter().map(|p| p.join("::")).collect();
    assert_eq!(found, ["a::k::g", "x", "x::v::u", "x::v::w", "x::y"]);
}

#[test]
fn types_are_seen_where_they_are_defined() {
    let text = [
        "pub(super) struct A<'a>(u8);",
        "    enum B {",
        "type C = u8;",
        "    type D = u8;",
        "let e;",
    ];
    assert_eq!(text.map(defined), [Some("A"), Some("B"), Some("C"), None, None]);
}
