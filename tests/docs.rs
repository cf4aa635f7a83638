//! What users read: links lead somewhere, examples are such as Ferry takes, every option is told of, and
//! what stands in two places is the same in both.
//!
//! A block of text after `<!-- as in FILE -->` is the one in the head of that module. With `FERRY_BLESS=1`
//! it is copied from there.

#[path = "docs/limits.rs"]
mod limits;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser};
use ferry::cli::args::Cli;
use ferry::cli::scan::{Command, OURS, Scan};

/// Most bytes of the README: a page that is read to its end.
const README: usize = 12 << 10;

/// Verbs of runc that examples use.
const RUNC: [&str; 9] =
    ["create", "delete", "exec", "kill", "list", "run", "spec", "state", "update"];

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = top().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All pages, by their path from the top.
fn pages() -> Vec<Page> {
    let mut paths: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"].map(PathBuf::from).into();
    for entry in fs::read_dir(top().join("docs")).expect("docs/") {
        let name = PathBuf::from(entry.expect("an entry").file_name());
        if name.extension().is_some_and(|kind| kind == "md") {
            paths.push(Path::new("docs").join(name));
        }
    }
    paths.into_iter().map(Page::read).collect()
}

/// A page of Markdown, as far as these tests want to know it.
struct Page {
    path: PathBuf,
    /// What stands between the blocks.
    prose: String,
    blocks: Vec<Block>,
    anchors: BTreeSet<String>,
}

/// A fenced block.
struct Block {
    language: String,
    text: String,
    /// The module whose head has the same.
    source: Option<String>,
}

impl Page {
    fn read(path: PathBuf) -> Page {
        let text = read(&path);
        let (mut prose, mut blocks) = (String::new(), Vec::<Block>::new());
        let (mut open, mut source) = (false, None);
        let mut headings = Vec::new();
        for line in text.lines() {
            match line.strip_prefix("```") {
                Some(_) if open => open = false,
                Some(language) => {
                    open = true;
                    let (language, text) = (language.to_owned(), String::new());
                    blocks.push(Block { language, text, source: source.take() });
                }
                None if open => {
                    let block = blocks.last_mut().expect("an open block");
                    block.text += line;
                    block.text.push('\n');
                }
                None => {
                    let marked = line.strip_prefix("<!-- as in ");
                    source = marked.and_then(|m| m.strip_suffix(" -->")).map(str::to_owned);
                    if line.starts_with('#') {
                        headings.push(line.trim_start_matches('#').trim());
                    }
                    prose += line;
                    prose.push('\n');
                }
            }
        }

        assert!(!open, "{}: a block is not closed", path.display());
        let anchors = anchors(&headings);
        Page { path, prose, blocks, anchors }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// What stands between single backticks.
    fn code(&self) -> impl Iterator<Item = &str> {
        // A span may go on in the next line, but not in the next paragraph.
        self.prose.split("\n\n").flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2))
    }
}

/// The names by which GitHub's links reach headings.
fn anchors(headings: &[&str]) -> BTreeSet<String> {
    let mut seen = HashMap::new();
    let anchor = |heading: &&str| {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        let name: String =
            kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect();
        let count = seen.entry(name.clone()).and_modify(|n| *n += 1).or_insert(0);
        if *count == 0 { name } else { format!("{name}-{count}") }
    };
    headings.iter().map(anchor).collect()
}

/// Where the links of a text lead to.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1);
    targets.filter_map(|rest| rest.split_once(')')).map(|(target, _)| target).collect()
}

/// Fails with all that was found.
fn none(found: Vec<String>) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_readme_is_one_page() {
    let length = read("README.md").len();
    assert!(length <= README, "README.md has {length} bytes, not {README} at most");
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    let by_path: BTreeMap<_, _> = pages
        .iter()
        .map(|page| (fs::canonicalize(top().join(&page.path)).unwrap(), page))
        .collect();
    let mut found = Vec::new();

    for page in &pages {
        for link in links(&page.prose).into_iter().filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let from = top().join(&page.path);
            let to = match path {
                "" => fs::canonicalize(&from),
                path => fs::canonicalize(from.parent().unwrap().join(path)),
            };
            let wrong = match to {
                Err(e) => Some(e.to_string()),
                Ok(to) if !to.starts_with(fs::canonicalize(top()).unwrap()) => {
                    Some("not in this repository".into())
                }
                Ok(to) => (!anchor.is_empty()
                    && !by_path.get(&to).is_some_and(|page| page.anchors.contains(anchor)))
                .then(|| "no such heading".into()),
            };
            found.extend(wrong.map(|wrong| format!("{}: {link}: {wrong}", page.name())));
        }
    }
    none(found);
}

/// The commands of a block, one a line.
fn commands(block: &Block) -> Vec<String> {
    let text = block.text.replace("\\\n", " ");
    let lines = text.lines().map(str::to_owned);
    match block.language.as_str() {
        "sh" => lines.collect(),
        "console" => lines.filter_map(|l| Some(l.strip_prefix("# ")?.to_owned())).collect(),
        _ => Vec::new(),
    }
}

/// A line as a shell divides it: commands of words, as far as examples go.
fn words(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut command, mut word) = (Vec::new(), Vec::new(), None::<String>);
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, ' ' | '|' | '&' | ';') => {
                command.extend(word.take());
                if c != ' ' && !command.is_empty() {
                    all.push(std::mem::take(&mut command));
                }
            }
            (None, c) => word.get_or_insert_default().push(c),
        }
    }

    command.extend(word);
    all.push(command);

    // What a redirection names is no argument.
    for command in &mut all {
        if let Some(at) =
            command.iter().position(|w| w.trim_start_matches('2').starts_with(['<', '>']))
        {
            command.truncate(at);
        }
    }

    all
}

/// Ferry's arguments in a command, where it is one of Ferry's.
fn ferry(command: &[String]) -> Option<&[String]> {
    let mut rest = command;
    loop {
        let (first, others) = rest.split_first()?;
        rest = match first.as_str() {
            "ferry" => return Some(others),
            "sudo" => others,
            "contrib/lab" if others.first().is_some_and(|w| w == "exec") => others.get(2..)?,
            word if word.contains('=') && !word.starts_with('-') => others,
            _ => return None,
        };
    }
}

/// What is wrong with Ferry's arguments.
fn wrong(arguments: &[String]) -> Option<String> {
    let scan = Scan::of(arguments.iter().map(OsString::from).collect());
    match scan.command {
        Command::Ours(line) => Cli::try_parse_from(line).err().map(|e| e.to_string()),
        Command::Version | Command::Help => None,
        _ => {
            let verb = scan.argv.iter().filter_map(|w| w.to_str()).find(|w| !w.starts_with('-'));
            (!verb.is_some_and(|verb| RUNC.contains(&verb))).then(|| format!("no verb: {verb:?}"))
        }
    }
}

#[test]
fn examples_are_what_ferry_takes() {
    let (mut found, mut count) = (Vec::new(), 0);
    for page in pages() {
        for line in page.blocks.iter().flat_map(commands) {
            for command in words(&line) {
                let Some(arguments) = ferry(&command) else { continue };
                count += 1;
                let wrong = wrong(arguments);
                found.extend(wrong.map(|wrong| format!("{}: {line}\n{wrong}", page.name())));
            }
        }
    }
    none(found);
    assert!(count > 20, "only {count} examples were found");
}

/// Ferry's verbs, each with all of its options that are not hidden.
fn options() -> BTreeMap<String, BTreeSet<String>> {
    let mut whole = Cli::command();
    whole.build();
    let verbs = whole.get_subcommands().filter(|verb| !verb.is_hide_set());
    let of = |verb: &clap::Command| {
        let shown = verb.get_arguments().filter(|option| !option.is_hide_set());
        shown.filter_map(|option| option.get_long()).map(str::to_owned).collect()
    };
    verbs.map(|verb| (verb.get_name().to_owned(), of(verb))).collect()
}

/// The name of an option, without dashes and value.
fn option(word: &str) -> Option<&str> {
    let name = word.strip_prefix("--")?;
    let name = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').next()?;
    (!name.is_empty()).then_some(name)
}

#[test]
fn every_option_is_told_of() {
    let told: BTreeSet<String> = pages()
        .iter()
        .filter(|page| page.path.ends_with("guide.md") || page.path.ends_with("networks.md"))
        .flat_map(|page| {
            let blocks = page.blocks.iter().map(|block| block.text.as_str());
            let words = page.code().chain(blocks).flat_map(str::split_whitespace);
            words.filter_map(option).map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    let mut found = Vec::new();
    for (verb, options) in options() {
        // Those every program has.
        let own = options.iter().filter(|option| !matches!(option.as_str(), "help" | "version"));
        let missing = own.filter(|option| !told.contains(*option));
        found.extend(missing.map(|option| format!("no word of ferry {verb} --{option}")));
    }
    none(found);
}

#[test]
fn options_in_the_text_exist() {
    let all = options();
    let any = |name: &str| name == "detach" || all.values().any(|options| options.contains(name));
    let mut found = Vec::new();
    for page in pages() {
        // There an option that stands by itself is Ferry's; elsewhere it may be anybody's.
        let of_ferry = page.path.ends_with("guide.md") || page.path.ends_with("networks.md");
        for code in page.code() {
            let mut words = code.split_whitespace();
            let unknown = match (words.next(), words.next()) {
                (Some("ferry"), Some(verb)) => {
                    let options = all.get(verb);
                    let known = |name: &str| options.is_none_or(|options| options.contains(name));
                    words.filter_map(option).find(|name| !known(name))
                }
                (Some(first), _) if of_ferry => option(first).filter(|name| !any(name)),
                _ => None,
            };
            let name = page.name();
            found.extend(unknown.map(|option| format!("{name}: `{code}`: no option --{option}")));
        }
    }
    none(found);
}

#[test]
fn scripts_and_sections_in_examples_exist() {
    let test = read("contrib/test");
    let all = test.lines().find_map(|l| l.strip_prefix("ALL=\"")).expect("a list of sections");
    let sections: Vec<&str> = all.trim_end_matches('"').split(' ').collect();
    let mut found = Vec::new();
    for page in pages() {
        for word in page.blocks.iter().flat_map(commands).flat_map(|line| words(&line)) {
            for (i, one) in word.iter().enumerate() {
                let ours = one.starts_with("contrib/") || one.starts_with("bundles/");
                if ours && !top().join(one).exists() {
                    found.push(format!("{}: there is no {one}", page.name()));
                }
                if one == "--only"
                    && !word.get(i + 1).is_some_and(|s| sections.contains(&s.as_str()))
                {
                    found.push(format!("{}: no such section: {word:?}", page.name()));
                }
            }
        }
    }
    none(found);
}

#[test]
fn data_in_examples_can_be_read() {
    let mut found = Vec::new();
    for page in pages() {
        for block in &page.blocks {
            let text = &block.text;
            let wrong = match block.language.as_str() {
                // A member of something may stand by itself.
                "json" if text.starts_with('"') => {
                    serde_json::from_str::<serde_json::Value>(&format!("{{{text}}}"))
                        .err()
                        .map(|e| e.to_string())
                }
                "json" => {
                    serde_json::from_str::<serde_json::Value>(text).err().map(|e| e.to_string())
                }
                "toml" => toml::from_str::<toml::Table>(text).err().map(|e| e.to_string()),
                "sh" | "console" | "text" => None,
                other => Some(format!("what is {other:?}?")),
            };
            found.extend(wrong.map(|wrong| format!("{}: {wrong} in\n{text}", page.name())));
        }
    }
    none(found);
}

/// The blocks of text in the head of a module.
fn heads(source: &str) -> Vec<String> {
    let text = read(source);
    let head = text.lines().map_while(|line| line.strip_prefix("//!"));
    let (mut blocks, mut open) = (Vec::<String>::new(), false);
    for line in head.map(|line| line.strip_prefix(' ').unwrap_or(line)) {
        match line {
            "```text" => {
                open = true;
                blocks.push(String::new());
            }
            "```" => open = false,
            line if open => {
                let block = blocks.last_mut().expect("an open block");
                *block += line;
                block.push('\n');
            }
            _ => {}
        }
    }
    blocks
}

#[test]
fn what_stands_in_two_places_is_the_same() {
    let mut found = Vec::new();
    let mut marked = BTreeSet::new();
    for page in pages() {
        for block in &page.blocks {
            let Some(source) = &block.source else { continue };
            marked.insert(source.clone());
            let heads = heads(source);
            if heads.contains(&block.text) {
                continue;
            }

            if let (Some(head), Some(_)) = (heads.first(), std::env::var_os("FERRY_BLESS")) {
                let text = read(&page.path).replace(&block.text, head);
                fs::write(top().join(&page.path), text).expect("a page");
            } else {
                let name = page.name();
                found.push(format!(
                    "{name}: the block after `as in {source}` is another one there: \
                     `FERRY_BLESS=1 cargo test --test docs` copies it"
                ));
            }
        }
    }

    none(found);
    for source in ["src/lib.rs", "src/migration/mod.rs"] {
        assert!(marked.contains(source), "no page has the floor plan of {source}");
    }
}

/// Both pictures are of the same migration.
#[test]
fn the_pictures_agree() {
    let text = read("README.md");
    let frozen =
        text.lines().find_map(|line| line.trim().strip_prefix("FROZEN")).expect("a picture");
    let downtime = frozen.split_whitespace().next().expect("a number");
    let drawn = read("docs/migration.svg");
    assert!(drawn.contains(&format!("downtime, {downtime} ms")), "not of {downtime} ms");
}

#[test]
fn every_page_is_linked_from_the_readme() {
    let pages = pages();
    let linked = links(&pages[0].prose);
    let reached = |page: &Page| {
        let name = page.name();
        linked.iter().any(|link| link.split('#').next() == Some(&name))
    };
    none(pages[1..].iter().filter(|page| !reached(page)).map(Page::name).collect());
}

#[test]
fn the_verbs_are_those_that_ferry_knows() {
    let all = options();
    for verb in OURS.iter().filter(|verb| !verb.starts_with("__")) {
        assert!(all.contains_key(*verb), "{verb}");
    }
}

#[test]
fn shell_is_divided_as_a_shell_does() {
    let line = "a=1 ferry run --detach x </dev/null >/dev/null 2>&1 && b 'c d' # e";
    let all = words(line);
    assert_eq!(all[0], ["a=1", "ferry", "run", "--detach", "x"]);
    assert_eq!(all[all.len() - 1], ["b", "c d"]);
    assert_eq!(ferry(&all[0]).unwrap(), ["run", "--detach", "x"]);
    assert!(wrong(&["migrate", "web", "h", "--no-such"].map(str::to_owned)).is_some());
    assert!(wrong(&["migrte", "web", "h"].map(str::to_owned)).is_some());
    assert!(wrong(&["migrate", "web", "h"].map(str::to_owned)).is_none());
}
