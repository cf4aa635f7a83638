# Helpers that contrib/lab, contrib/demo and contrib/test share. Meant to be sourced:
#   . "$(dirname "$(readlink -f "$0")")/lib.sh"
# shellcheck shell=bash

# Progress goes to stderr: stdout belongs to the answers (`lab addr`, `lab pid`, …).
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
warn() { printf '%s: warning: %s\n' "${0##*/}" "$*" >&2; }
die() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }
hint() { printf '%s: hint: %s\n' "${0##*/}" "$*" >&2; }

need_root() { [ "$(id -u)" = 0 ] || die "this must be run as root"; }
have() { command -v "$1" >/dev/null 2>&1; }

# wait_until SECONDS COMMAND...: awaits a condition; fails when the time is over.
# The condition is asked every 10 ms: no one ever waits for a guessed time.
wait_until() {
    local end=$((${EPOCHREALTIME/[.,]/} + $1 * 1000000)) pause=0.01
    shift
    until "$@"; do
        [ "${EPOCHREALTIME/[.,]/}" -lt "$end" ] || return 1
        sleep "$pause"
    done
}

# Milliseconds of a clock that is good for differences.
now_ms() { printf '%s\n' $((${EPOCHREALTIME/[.,]/} / 1000)); }

# start_time PID: when the process began, in ticks since boot; with the pid it names a process for good.
start_time() {
    local stat
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    # The name in brackets may hold spaces and brackets: count from the last one.
    # shellcheck disable=SC2086  # the fields are wanted as words
    set -- ${stat##*) }
    [ "$1" != Z ] || return 1
    printf '%s\n' "${20}"
}

# is_alive PID START_TIME: false for a stranger that was given the same number later.
is_alive() { [ "$(start_time "$1")" = "$2" ]; }

# cgroup_parents: one line "VERSION DIRECTORY" for every cgroup hierarchy that is mounted here.
# In v1 that is our own group, so that limits which hold for us hold for what we start;
# in v2 the top, because a group with processes in it cannot hand controllers to children.
cgroup_parents() {
    local line type point opts own id ctrl path
    declare -A own=()
    while IFS=: read -r id ctrl path; do
        [ "$id" = 0 ] || own["${ctrl%%,*}"]=$path
    done </proc/self/cgroup
    while read -r line; do
        # shellcheck disable=SC2086
        set -- $line
        point=$5
        # shellcheck disable=SC2086
        set -- ${line#* - }
        type=$1 opts=$3
        case $type in
            cgroup2) printf '2 %s\n' "$point" ;;
            cgroup)
                for ctrl in "${!own[@]}"; do
                    case ",$opts," in
                        *,"$ctrl",*)
                            path=${own[$ctrl]}
                            [ "$path" != / ] || path=
                            printf '1 %s\n' "$point$path"
                            ;;
                    esac
                done
                ;;
        esac
    done </proc/self/mountinfo | sort -u
}

# cgroup_make VERSION DIRECTORY: a child group that processes can join at once.
cgroup_make() {
    local file ctrl
    mkdir -p "$2"
    case $1 in
        1)  # a new cpuset is empty and takes no process
            for file in cpuset.cpus cpuset.mems; do
                [ ! -e "$2/$file" ] || cat "${2%/*}/$file" >"$2/$file"
            done
            ;;
        2)
            for ctrl in cpuset cpu io memory pids; do
                { echo "+$ctrl" >"${2%/*}/cgroup.subtree_control"; } 2>/dev/null || true
            done
            ;;
    esac
}

cgroup_pids() { find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null; }

# cgroup_end DIRECTORY: ends everything in a group and the groups below it, and removes them.
# False while a dying process still holds one: to be asked again.
cgroup_end() {
    local pid
    [ -d "$1" ] || return 0
    if ! { echo 1 >"$1/cgroup.kill"; } 2>/dev/null; then # v1 has no such file
        while read -r pid; do kill -KILL "$pid" 2>/dev/null || true; done < <(cgroup_pids "$1")
    fi
    find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [ ! -d "$1" ]
}

# ---------------------------------------------------------------- packages

missing_packages() { # ROOT PACKAGE...
    local root=$1 p
    shift
    for p in "$@"; do
        case $(dpkg-query --admindir="${root%/}/var/lib/dpkg" -W -f '${db:Status-Status}' "$p" 2>/dev/null) in
            installed) ;;
            *) printf '%s ' "$p" ;;
        esac
    done
}

install_on_machine() { # PACKAGE...
    local missing
    have dpkg-query || { warn "not a Debian: install by hand what is missing of: $*"; return; }
    missing=$(missing_packages / "$@")
    [ -n "$missing" ] || return 0
    say "installing on this machine: $missing"
    apt-get update -q >&2
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >&2
}

# ---------------------------------------------------------------- Rust

RUST_WANTED=1.88
# What stands before `cargo` and `rustc`: nothing, or the way into the lab's base.
RUST=()

rust_is_new() { # VERSION
    [ -n "$1" ] && [ "$(printf '%s\n' "$RUST_WANTED" "$1" | sort -V | head -n 1)" = "$RUST_WANTED" ]
}

# rust_is_here: a toolchain that is new enough, and may be taken.
rust_is_here() {
    [ "${FERRY_RUST:-}" != base ] && have rustc && rust_is_new "$(cargo --version 2>/dev/null | cut -d ' ' -f 2)"
}

# rust_ready: from here on `rust cargo …` works. A toolchain that is there and new enough is taken;
# else Debian's, if that is; else the one of the lab's base, which is Debian testing.
# FERRY_RUST=base asks for that one. `contrib/lab prepare` must have run.
rust_ready() {
    local version candidate top lab
    ! rust_is_here || return 0
    top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    lab=$top/contrib/lab
    version=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || true
    if [ "${FERRY_RUST:-}" != base ] && have apt-cache; then
        candidate=$(apt-cache policy cargo 2>/dev/null | sed -n 's/^ *Candidate: *//p')
        if rust_is_new "${candidate%%[+~-]*}"; then
            install_on_machine cargo rustc rust-clippy rustfmt
            return
        fi
    fi
    say "no Rust of $RUST_WANTED or newer here${version:+ (found $version)}: building in the lab's base"
    # Cargo's downloads and its configuration are the caller's own.
    CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}
    mkdir -p "$CARGO_HOME" "${CARGO_TARGET_DIR:=$top/target}"
    export CARGO_HOME CARGO_TARGET_DIR
    if ! "$lab" base --install "cargo rustc rust-clippy rustfmt gcc libc6-dev ca-certificates" true; then
        hint "https://rustup.rs installs one"
        die "no Rust toolchain"
    fi
    RUST=("$lab" base --bind "$top" --bind "$CARGO_HOME" --bind "$CARGO_TARGET_DIR")
}

# rust_lints: also rustfmt and clippy, which some toolchains come without.
rust_lints() {
    [ "${#RUST[@]}" = 0 ] || return 0 # they came with it
    if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
        if have rustup; then rustup component add rustfmt clippy; else install_on_machine rust-clippy rustfmt; fi
    fi
}

# rust COMMAND...: cargo, or a script that calls it, with the toolchain that rust_ready found.
rust() { "${RUST[@]}" "$@"; }

# ---------------------------------------------------------------- output

# quietly WHAT COMMAND...: one line that says what is being done and how long it took; what the
# command says is shown only if it fails.
quietly() {
    local what=$1 log status=0 began
    shift
    log=$(mktemp)
    began=$(now_ms)
    printf '%-44s' "$what …"
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" = 0 ]; then
        printf ' %6s s\n' "$((($(now_ms) - began) / 1000)).$((($(now_ms) - began) % 1000 / 100))"
    else
        printf ' failed\n'
        tail -n 40 "$log" | sed 's/^/  | /'
    fi
    rm -f "$log"
    return "$status"
}
