# A container on one lab host and a probe that watches it from another: what contrib/demo,
# contrib/bench and the suites in tests/ have in common. Meant to be sourced, after lib.sh.
# shellcheck shell=bash

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What makes the hosts: contrib/lab, or something with the same verbs.
: "${hosts_by:=$top/contrib/lab}"
lab() { "$hosts_by" "$@"; }
on() { lab exec "$@"; }

# stage_name WHAT: a lab of this run's own, and a directory `scratch` for its files.
stage_name() {
    export FERRY_LAB=$1$$
    unset FERRY_LAB_DIR
    scratch=$(mktemp -d)
}

# Ends what this run began. For an EXIT trap: it neither asks nor fails.
stage_clear() {
    probe_abandon
    lab down || true
    rm -rf "$scratch"
    give_back
}

# give_back: what was built as root goes to whoever has called sudo, or his own cargo could not go on with it.
give_back() {
    local directory
    [ -n "${SUDO_UID:-}" ] && [ "$(id -u)" = 0 ] || return 0
    for directory in "$top/target" "${CARGO_TARGET_DIR:-$top/target}"; do
        [ ! -d "$directory" ] ||
            find "$directory" -uid 0 -exec chown -h "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" {} + || true
    done
}

# stage_up [--engines | --programs] HOST...: starts the lab. Fills `shared`, where /srv/shared lies on this machine, and
# `net`, what all addresses begin with.
stage_up() {
    # FERRY_BIN: another ferry than the one built last
    lab up ${FERRY_BIN:+--ferry "$FERRY_BIN"} "$@" 2>"$scratch/up" || { cat "$scratch/up" >&2; return 1; }
    while [ "${1#--}" != "$1" ]; do shift; done
    shared=$(lab root "$1")/srv/shared
    net=$(lab addr "$1")
    net=${net%.*}
    install -m 755 "$top/target/bundles/bin/ferry-probe" "$shared/ferry-probe"
}

# netns_make HOST NAME ADDRESS: a named network namespace with a macvlan over the host's eth0.
# Its MAC is made of the address: a client knows the pair from a container before it, and a wrong
# one would cost it minutes.
netns_make() {
    local mac part
    IFS=. read -ra part <<<"$3"
    printf -v mac '02:fe:%02x:%02x:%02x:%02x' "${part[@]}"
    # shellcheck disable=SC2016  # the dollars are the host's
    on "$1" sh -euc '
        ip netns add "$1"
        ip link add link eth0 name "$1.0" address "$3" netns "$1" type macvlan mode bridge
        ip -n "$1" link set "$1.0" name eth0
        ip -n "$1" link set lo up
        ip -n "$1" addr add "$2/24" dev eth0
        ip -n "$1" link set eth0 up
    ' sh "$2" "$3" "$mac"
}

# container_make HOST NAME WORKLOAD ADDRESS [OPTIONS of bundles/make]: network and bundle.
# The bundle lies on storage that all hosts see. More to do to its config.json: a jq program in EDIT.
container_make() {
    local host=$1 name=$2 workload=$3 address=$4 base
    shift 4
    netns_make "$host" "$name" "$address"
    base=$(lab root "$host")
    "$top/bundles/make" --netns "/run/netns/$name" --base "$base" "$@" "$workload" "$shared/$name"
    if [ -n "${EDIT:-}" ]; then
        jq "$EDIT" "$shared/$name/config.json" >"$scratch/config.json"
        cp "$scratch/config.json" "$shared/$name/config.json"
    fi
}

# container_run HOST NAME [RUNTIME [BUNDLE]]: starts it. What the runtime says goes into a log of its
# own, since the container keeps the standard streams that it is given.
container_run() {
    # shellcheck disable=SC2016
    on "$1" sh -c '"$2" --log /run/run.log run -d -b "$3" "$1" </dev/null >/dev/null 2>&1 ||
        { cat /run/run.log; exit 1; }' sh "$2" "${3:-ferry}" "${4:-/srv/shared/$2}"
}

answers() { # HOST ADDRESS PORT
    # A SYN that gets lost is asked again by us, and not after the kernel's many seconds.
    on "$1" timeout 2 bash -c ": <>/dev/tcp/$2/$3" 2>/dev/null
}

# migrate NAME FROM TO REPORT [OPTIONS]: by ferry, over ssh; its report is in the file REPORT.
migrate() {
    local status=0 name=$1 from=$2 to=$3 report=$4
    shift 4
    on "$from" ferry migrate --json "$@" "$name" "$to" >"$scratch/events" 2>"$scratch/migrate.err" </dev/null || status=$?
    jq -c 'select(.event == "report")' "$scratch/events" >"$report" || true
    [ "$status" = 0 ] || { cat "$scratch/migrate.err" >&2; return "$status"; }
}

# ---------------------------------------------------------------- the probe

probe_pid=''

# probe_start HOST ADDRESS:PORT [OPTIONS of ferry-probe]: returns when all connections stand.
probe_start() {
    local host=$1 to=$2
    shift 2
    talk_start "$host" /srv/shared/ferry-probe --to "$to" "$@"
}

# talk_start HOST COMMAND...: the same with another client that obeys words and says JSON.
talk_start() {
    rm -f "$scratch/probe.in" "$scratch/probe.out"
    mkfifo "$scratch/probe.in" "$scratch/probe.out"
    # Not `on`: a function in the background would put a shell in between, whose end is not the probe's.
    "$hosts_by" exec "$@" <"$scratch/probe.in" >"$scratch/probe.out" 2>"$scratch/probe.err" &
    probe_pid=$!
    exec {probe_in}>"$scratch/probe.in" {probe_out}<"$scratch/probe.out"
    probe_hear ready 30 >/dev/null || { cat "$scratch/probe.err" >&2; return 1; }
}

# probe_hear KEY SECONDS: the next line that has this key.
probe_hear() {
    local line
    while IFS= read -r -t "$2" line <&"$probe_out"; do
        case $line in *"\"$1\""*) printf '%s\n' "$line"; return ;; esac
    done
    warn "the probe says nothing of \"$1\" within $2 s"
    return 1
}

# probe_ask KEY COMMAND: what it answers.
probe_ask() {
    printf '%s\n' "$2" >&"$probe_in"
    probe_hear "$1" 150
}
probe_mark() { probe_ask mark "mark $1" >/dev/null; }
probe_report() { probe_ask window_ms "report since $1"; }

# Whether in the time since the mark `now` every connection has had answers, as many as there should
# be. A connection without any would have a pause as long as that time.
probe_is_steady() {
    probe_report now | jq -e '.answers >= 50 * (.connections - .connections_lost)
        and (.connections == .connections_lost or .worst_pause_ms < .window_ms)' >/dev/null
}
# probe_steady [SECONDS]: awaits that. After a long pause it takes long: TCP asks again ever less often.
probe_steady() {
    probe_mark now
    wait_until "${1:-60}" probe_is_steady
}

# The end of the probe; its exit status.
probe_end() {
    local pid=$probe_pid
    probe_pid=''
    printf 'quit\n' >&"$probe_in"
    exec {probe_in}>&- {probe_out}<&-
    wait "$pid"
}

probe_abandon() {
    [ -z "$probe_pid" ] || kill "$probe_pid" 2>/dev/null || true
    probe_pid=''
}

# ---------------------------------------------------------------- numbers

# mebibytes SIZE: `64M`, `1G`, `64` (that is MiB already).
mebibytes() {
    case $1 in
        *[!0-9]*)
            case $1 in
                [1-9]*[GM])
                    local n=${1%[GM]}
                    case $n in *[!0-9]*) die "not a size: $1 (64M, 1G)" ;; esac
                    [ "${1: -1}" = M ] || n=$((n * 1024))
                    echo "$n"
                    ;;
                *) die "not a size: $1 (64M, 1G)" ;;
            esac
            ;;
        '') die "a size is missing (64M, 1G)" ;;
        *) echo "$1" ;;
    esac
}

number() { # WHAT VALUE
    case $2 in '' | 0 | *[!0-9]*) die "$1: not a number: $2" ;; esac
    echo "$2"
}

# Whether a terminal or a file takes more than ASCII.
block_char() {
    case ${LC_ALL:-${LC_CTYPE:-${LANG:-}}} in *[Uu][Tt][Ff]*8*) echo █ ;; *) echo '#' ;; esac
}
