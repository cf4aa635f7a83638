//! What Ferry is made of: each crate's license and origin, held to deny.toml.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Reads an expression of SPDX's: licenses that are joined by OR, AND, WITH and brackets. Older crates
/// write a slash for OR.
fn is_allowed(expression: &str, allow: &[&str]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let allowed = any(&mut words, allow);
    assert_eq!(words.next(), None, "{expression:?} goes on");
    allowed
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

/// Those of which one is enough. AND binds more closely.
fn any(words: &mut Words, allow: &[&str]) -> bool {
    let mut allowed = all(words, allow);
    while words.next_if_eq(&"OR").is_some() {
        // All of them are read.
        allowed |= all(words, allow);
    }
    allowed
}

/// Those that hold together.
fn all(words: &mut Words, allow: &[&str]) -> bool {
    let mut allowed = one(words, allow);
    while words.next_if_eq(&"AND").is_some() {
        allowed &= one(words, allow);
    }
    allowed
}

fn one(words: &mut Words, allow: &[&str]) -> bool {
    let word = words.next().expect("a license");
    if word == "(" {
        let allowed = any(words, allow);
        assert_eq!(words.next(), Some(")"));
        return allowed;
    }
    // An exception gives more than the license alone.
    if words.next_if_eq(&"WITH").is_some() {
        words.next().expect("an exception");
    }
    allow.contains(&word)
}

fn deny() -> toml::Table {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml");
    fs::read_to_string(path).expect("deny.toml").parse().expect("TOML")
}

fn strings<'a>(deny: &'a toml::Table, section: &str, key: &str) -> Vec<&'a str> {
    let list = deny[section][key].as_array().expect("a list");
    list.iter().map(|word| word.as_str().expect("a string")).collect()
}

/// Each crate that Ferry is built of for a target: as cargo says without asking the network; or, where cargo is in
/// another place than the tests, has said in a file `FERRY_CRATES.TARGET`.
fn crates(target: &str) -> Vec<Value> {
    let said = match std::env::var("FERRY_CRATES") {
        Ok(path) => fs::read(format!("{path}.{target}")).expect("what cargo has said"),
        Err(_) => metadata(target),
    };
    let all: Value = serde_json::from_slice(&said).expect("JSON");
    all["packages"].as_array().expect("packages").clone()
}

fn metadata(target: &str) -> Vec<u8> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--offline", "--locked", "--all-features"])
        .args(["--filter-platform", target])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {said}");
    output.stdout
}

/// A crate's license; of one that names only a file, what is in that.
fn license(package: &Value) -> String {
    if let Some(expression) = package["license"].as_str() {
        return expression.to_owned();
    }
    let manifest = Path::new(package["manifest_path"].as_str().expect("a manifest"));
    let file = package["license_file"].as_str().expect("a license's file");
    let text = fs::read_to_string(manifest.with_file_name(file)).expect("a license");
    let words: Vec<_> = text.split_whitespace().collect();
    let is_mit = words.join(" ").contains(
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this \
         software and associated documentation files",
    );
    if is_mit { "MIT" } else { "unknown" }.to_owned()
}

#[test]
fn licenses_and_origins_are_those_of_deny_toml() {
    let deny = deny();
    let (allow, registries) =
        (strings(&deny, "licenses", "allow"), strings(&deny, "sources", "allow-registry"));
    let mut wrong = Vec::new();
    for target in strings(&deny, "graph", "targets") {
        let crates = crates(target);
        assert!(crates.len() > 50, "{} crates", crates.len());
        for package in &crates {
            let license = license(package);
            if !is_allowed(&license, &allow) {
                wrong.push(format!("{}: {license}", package["name"]));
            }
            // Ours have none.
            let Some(source) = package["source"].as_str() else { continue };
            let known =
                source.strip_prefix("registry+").is_some_and(|from| registries.contains(&from));
            if !known {
                wrong.push(format!("{} comes from {source}", package["name"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn expressions_are_understood() {
    let allow = ["MIT", "Apache-2.0", "Unicode-3.0"];
    for good in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT/GPL-3.0",
        "(MIT OR GPL-3.0) AND Unicode-3.0",
        "GPL-3.0 AND MIT OR Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(is_allowed(good, &allow), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND MPL-2.0", "MIT AND (GPL-3.0)"] {
        assert!(!is_allowed(bad, &allow), "{bad}");
    }
}
