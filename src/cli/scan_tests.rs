//! The scan against command lines as callers write them, and against all orders of flags.

use super::*;

fn os(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn scan(words: &[&str]) -> Scan {
    Scan::of(os(words))
}

fn guarded(ids: &[&str]) -> Command {
    Command::Guarded(os(ids))
}

#[test]
fn callers_of_runc() {
    let shim = ["--root", "/run/c/k8s.io", "--log", "/b/log.json", "--log-format", "json"];
    let with = |rest: &[&str]| scan(&[&shim[..], rest].concat());
    let create = with(&["create", "--bundle", "/b", "--pid-file", "/b/init.pid", "web"]);
    assert_eq!(create.command, guarded(&["web"]));
    assert_eq!(create.root.unwrap(), PathBuf::from("/run/c/k8s.io"));
    assert_eq!(create.log.file.unwrap(), PathBuf::from("/b/log.json"));
    assert_eq!(create.log.format, Format::Json);
    assert_eq!(
        with(&["restore", "--detach", "-no-subreaper", "--bundle", "/b", "web"]).command,
        guarded(&["web"])
    );
    assert_eq!(with(&["start", "web"]).command, guarded(&["web"]));
    assert_eq!(with(&["kill", "--all", "web", "9"]).command, Command::Runtime);
    assert_eq!(with(&["update", "--resources=-", "web"]).command, Command::Runtime);
    // podman's and CRI-O's question whether restore knows the flag.
    assert_eq!(scan(&["restore", "--lsm-mount-context"]).command, guarded(&[]));
    assert_eq!(scan(&["checkpoint", "--help"]).command, Command::Checkpoint(Vec::new()));
    assert_eq!(scan(&["features"]).command, Command::Runtime);
    assert_eq!(scan(&["--systemd-cgroup", "run", "web"]).command, guarded(&["web"]));
}

#[test]
fn the_configuration_of_a_new_container() {
    let file = |words: &[&str]| scan(words).creates.map(|path| path.display().to_string());
    let at = |path: &str| Some(path.to_owned());
    assert_eq!(file(&["create", "--bundle", "/b", "web"]), at("/b/config.json"));
    assert_eq!(file(&["--root", "/r", "run", "-d", "-b=b", "web"]), at("b/config.json"));
    assert_eq!(file(&["run", "--pid-file", "--bundle", "web"]), at("config.json"));
    assert_eq!(file(&["run", "-b", "a", "--bundle=b", "--", "-b", "c"]), at("b/config.json"));
    assert_eq!(file(&["create", "--config=mine", "-b", "/b", "web"]), at("/b/mine"));
    assert_eq!(file(&["--new", "x", "create", "-b", "/b", "web"]), at("/b/config.json"));
    for other in [&["start", "web"][..], &["restore", "-b", "/b", "web"], &["ps", "create"], &[]] {
        assert_eq!(file(other), None, "{other:?}");
    }
}

#[test]
fn version_and_help() {
    for words in [&["--version"][..], &["-v"], &["-version"], &["--root", "x", "--version", "ps"]] {
        assert_eq!(scan(words).command, Command::Version, "{words:?}");
    }
    for words in [&[][..], &["--help"], &["-h"], &["help"], &["h"], &["--debug"], &["-h", "-v"]] {
        assert_eq!(scan(words).command, Command::Help, "{words:?}");
    }
    for words in [&["--version=false", "ps"][..], &["help", "ps"], &["ps", "--help"], &["-x", "-v"]]
    {
        assert_eq!(scan(words).command, Command::Runtime, "{words:?}");
    }
    let migrate_help = Command::Ours(os(&["ferry", "migrate", "--help"]));
    for words in [&["help", "migrate"][..], &["migrate", "--help"], &["--help", "migrate"]] {
        assert_eq!(scan(words).command, migrate_help, "{words:?}");
    }
}

#[test]
fn values_are_no_verbs() {
    assert_eq!(scan(&["--root", "migrate", "ps", "web"]).command, Command::Runtime);
    assert_eq!(scan(&["--log", "--version", "ps"]).command, Command::Runtime);
    assert_eq!(scan(&["exec", "web", "migrate"]).command, Command::Runtime);
    assert_eq!(scan(&["exec", "web", "ferry", "--ferry-runtime", "x"]).argv.len(), 5);
    assert_eq!(scan(&["run", "--bundle", "other", "web"]).command, guarded(&["web"]));
    assert_eq!(scan(&["run", "web", "-b", "other"]).command, guarded(&["web"]));
    assert_eq!(scan(&["run", "-b=other", "--", "web"]).command, guarded(&["web"]));
    assert_eq!(scan(&["run", "--new-switch", "web"]).command, guarded(&["web"]));
}

#[test]
fn unknown_globals_hide_our_verbs_but_not_the_guard() {
    assert_eq!(scan(&["--new", "migrate", "web", "host2"]).command, Command::Runtime);
    assert_eq!(scan(&["--new", "value", "start", "web"]).command, guarded(&["web"]));
    assert_eq!(scan(&["--new=value", "start", "web"]).command, guarded(&["web"]));
}

#[test]
fn the_runtime_flag_is_taken_out() {
    for form in
        [&["--ferry-runtime", "crun"][..], &["--ferry-runtime=crun"], &["-ferry-runtime", "crun"]]
    {
        let scan = scan(&[&["--root", "r"], form, &["ps", "web"]].concat());
        assert_eq!(scan.ferry_runtime.unwrap(), "crun");
        assert_eq!(scan.argv, os(&["--root", "r", "ps", "web"]));
    }
    assert_eq!(scan(&["--ferry-runtime"]).command, Command::NoRuntimeGiven);
    // Behind `--` it is a word like any other.
    assert_eq!(scan(&["--", "--ferry-runtime", "x"]).argv.len(), 3);
}

#[test]
fn bytes_that_are_not_text() {
    let bad = OsString::from_vec(b"\xff\xfe".to_vec());
    let flag = OsString::from_vec(b"--root=/\xff".to_vec());
    let scan = Scan::of(vec![flag.clone(), "start".into(), bad.clone()]);
    assert_eq!(scan.command, Command::Guarded(vec![bad.clone()]));
    assert_eq!(scan.argv, [flag, "start".into(), bad]);
}

/// Whatever the order and the spelling of the globals, the verb is found, and the runtime
/// sees every byte but ours.
#[test]
fn every_order_and_spelling_of_the_globals() {
    let spellings: [&[&[&str]]; 6] = [
        &[&["--root", "/r"], &["--root=/r"], &["-root", "/r"], &["-root=/r"]],
        &[&["--log", "start"], &["-log=start"]],
        &[&["--log-format", "json"], &["-log-format=json"]],
        &[&["--debug"], &["-debug=true"]],
        &[&["--systemd-cgroup"], &["--systemd-cgroup=1"]],
        &[&["--ferry-runtime", "crun"], &["-ferry-runtime=crun"]],
    ];

    let mut seen = 0;
    let mut order: Vec<usize> = (0..spellings.len()).collect();
    permutations(&mut order, 0, &mut |order| {
        // A different mix of spellings for each order.
        seen += 1;
        let pick = |i: &usize| spellings[*i][(seen / (i + 1)) % spellings[*i].len()];
        let globals: Vec<&str> = order.iter().flat_map(pick).copied().collect();
        let others: Vec<&str> = order.iter().filter(|i| **i != 5).flat_map(pick).copied().collect();

        let start = scan(&[&globals[..], &["start", "web"]].concat());
        assert_eq!(start.command, guarded(&["web"]), "{globals:?}");
        assert_eq!(start.argv, os(&[&others[..], &["start", "web"]].concat()), "{globals:?}");
        assert_eq!(start.root.as_deref(), Some("/r".as_ref()));
        assert_eq!(start.log.file.as_deref(), Some("start".as_ref()));
        assert_eq!(start.log.format, Format::Json);
        assert_eq!(start.ferry_runtime.as_deref(), Some("crun".as_ref()));

        let Command::Ours(line) = scan(&[&globals[..], &["migrate", "web", "h"]].concat()).command
        else {
            panic!("{globals:?}")
        };
        let (head, verb) = line.split_at(line.len() - 3);
        assert_eq!(verb, os(&["migrate", "web", "h"]));

        let mut head = head.to_vec();
        head.sort();
        let expected = [
            "--debug",
            "--log-format=json",
            "--log=start",
            "--root=/r",
            "--systemd-cgroup",
            "ferry",
        ];
        assert_eq!(head, os(&expected), "{globals:?}");
    });
    assert_eq!(seen, 720);
}

fn permutations(items: &mut [usize], from: usize, each: &mut impl FnMut(&[usize])) {
    if from == items.len() {
        return each(items);
    }
    for i in from..items.len() {
        items.swap(from, i);
        permutations(items, from + 1, each);
        items.swap(from, i);
    }
}
