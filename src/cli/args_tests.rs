//! Our verbs' command lines.

use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("ferry").chain(line.split_whitespace()))
}

fn migrate(line: &str) -> MigrateArgs {
    match parse(line).unwrap().verb {
        Verb::Migrate(args) => args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn definition_is_sound() {
    Cli::command().debug_assert();
    let known: Vec<_> = Cli::command().get_subcommands().map(|v| v.get_name().to_owned()).collect();
    assert_eq!(known, crate::cli::scan::OURS);
}

#[test]
fn migrate_with_everything() {
    let args = migrate(
        "migrate --rsh myssh --remote-ferry /opt/ferry --bundle /b --network bridge=br0 \
         --console-socket /c --timeout 30s --dry-run --json --report /r --no-mark web a@host2",
    );
    assert_eq!(args.container, "web");
    assert_eq!(args.destination.to_string(), "a@host2");
    assert_eq!(args.remote.rsh.as_deref(), Some("myssh"));
    assert_eq!(args.remote.remote_ferry.as_deref(), Some(OsStr::new("/opt/ferry")));
    assert_eq!(args.network, Placement::Bridge("br0".into()));
    assert_eq!(args.timeout, Some(Duration::from_secs(30)));
    assert!(args.dry_run && args.json && !args.mark());
    let plain = migrate("migrate web host2");
    assert_eq!((plain.network.clone(), plain.mark(), plain.timeout), (Placement::Auto, true, None));
    assert!(migrate("migrate --no-mark --leave-mark web host2").mark());
}

#[test]
fn globals_before_or_after_the_verb() {
    for line in [
        "--root /r --log /l --log-format json --systemd-cgroup --debug migrate web h",
        "migrate web h --root /r --log /l --log-format json --systemd-cgroup --debug",
        "--root=/r migrate --log=/l web --log-format=json h --systemd-cgroup --debug",
    ] {
        let globals = parse(line).unwrap().globals;
        assert_eq!(globals.root.as_deref(), Some("/r".as_ref()), "{line}");
        assert_eq!(globals.log.as_deref(), Some("/l".as_ref()), "{line}");
        assert_eq!(globals.log_format, Format::Json, "{line}");
        assert!(globals.systemd_cgroup && globals.debug, "{line}");
    }
}

#[test]
fn what_is_not_built_is_not_accepted() {
    for line in [
        "migrate --postcopy always web h",
        "migrate --compress gzip web h",
        "migrate --bandwidth 0M web h",
        "migrate --max-rounds 0 web h",
        "migrate --streams 0 web h",
        "migrate --rootfs moved web h",
        "migrate --volume data=copy web h",
        "migrate --volume /data web h",
        "migrate --source-files maybe web h",
        "migrate --network hook=x web h",
        "migrate web tls://h:1",
        "receive --listen tls://0.0.0.0:1",
        "receive",
        "receive --stdio --listen unix:/x",
        "migrate web",
        "migrate a/b h",
        "migrate web h --timeout 5",
        "resolve web --keep --discard",
    ] {
        let error = parse(line).map(|_| line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

/// The derive makes a group of all arguments of a verb, and one of them kept out the others.
#[test]
fn receive_takes_its_options_together() {
    for line in ["receive --stdio --own-stderr", "receive --listen unix:/x --own-stderr"] {
        assert!(parse(line).is_ok(), "{line}");
    }
}

#[test]
fn forwarding_ends_now_or_when_idle() {
    let idle = |line: &str| match parse(line).map(|c| c.verb) {
        Ok(Verb::Resolve(args)) => Ok(args.when_idle),
        Ok(other) => panic!("{other:?}"),
        Err(e) => Err(e.kind()),
    };
    assert_eq!(idle("resolve --no-forward web"), Ok(None));
    assert_eq!(idle("resolve web --no-forward --when-idle"), Ok(Some(Duration::from_secs(30))));
    assert_eq!(idle("resolve --no-forward --when-idle=2m web"), Ok(Some(Duration::from_secs(120))));
    assert!(idle("resolve --when-idle web").is_err());
}

#[test]
fn resolve_is_for_one_or_for_all() {
    let resolve = |line: &str| match parse(line).map(|cli| cli.verb) {
        Ok(Verb::Resolve(args)) => Some(args),
        Ok(other) => panic!("{other:?}"),
        Err(_) => None,
    };
    let one = resolve("resolve web --timeout 5s").unwrap();
    assert_eq!((one.id.as_deref(), one.all), (Some("web"), false));
    assert_eq!(one.timeout, Some(Duration::from_secs(5)));
    assert!(resolve("resolve --all --boot").unwrap().boot);
    for line in [
        "resolve",
        "resolve --all web",
        "resolve --all --keep",
        "resolve --all --discard",
        "resolve --boot web",
        "resolve --all --boot --timeout 5s",
    ] {
        assert!(resolve(line).is_none(), "{line}");
    }
}
