#!/usr/bin/env bash
# Programs as Debian has them, each in a container of its own with the whole Debian as its image, moved
# three times under a client that knows what it must get. Nothing may fail on the client, and nothing that
# it was told is done may be gone. One file a program in tests/programs/.
#
#   tests/programs.sh [NAME]...     all, or these
#
# Needs root. Prints a table of what clients waited, then "N passed, N failed", and fails when something failed.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
# shellcheck source=contrib/lib.sh
. contrib/lib.sh
# shellcheck source=contrib/stage.sh
. contrib/stage.sh
# shellcheck source=tests/check.sh
. tests/check.sh
need_root

ALL='postgresql sqlite mariadb memcached supervisor haproxy caddy node php mosquitto jvm sshd python'
for program; do
    case " $ALL " in *" $program "*) ;; *) die "no such program: $program (there are: $ALL)" ;; esac
done

table=()
suite_begin programs

# ---------------------------------------------------------------- containers

# On each host's own disk: a root that is an overlay upon the image, whose upper layer goes along.
bundle() { echo "/srv/local/$program"; }
rootfs() { echo "$(lab root "$1")$(bundle)/rootfs"; } # HOST: as seen from here
inside() { # COMMAND...: in the root of the program, before it runs
    on "$from" chroot "$(bundle)/rootfs" "$@"
}

# make_container EDIT: network and bundle. Its first process is /start, which is read from standard input.
# The capabilities are those that docker gives.
make_container() {
    from=a to=b downtimes=()
    netns_make a "$program" "$address" || return 1
    # shellcheck disable=SC2016  # the dollars are the host's
    on a sh -euc 'mkdir -p "$1/upper" "$1/work" "$1/rootfs"
        mount -t overlay overlay -o "lowerdir=/srv/base,upperdir=$1/upper,workdir=$1/work" "$1/rootfs"' sh "$(bundle)" || return 1
    cat >"$(rootfs a)/start" || return 1
    chmod 755 "$(rootfs a)/start"
    jq --arg netns "/run/netns/$program" '
        .linux.namespaces += [{type: "network", path: $netns}]
        | .process.args = ["/start"] | .process.noNewPrivileges = false
        | (["CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP",
            "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"] | map("CAP_" + .)) as $all
        | .process.capabilities = {bounding: $all, effective: $all, permitted: $all}
    '"| ${1:-.}" bundles/base.json >"$(lab root a)$(bundle)/config.json"
}
# start_container PORT: until it is answered there.
start_container() {
    container_run a "$program" ferry "$(bundle)" || return 1
    wait_until 60 answers client "$address" "$1" && return
    echo "nobody answers at port $1; it says:"
    cat "$(rootfs a)/log"
    return 1
}
# To the other host, while the load is on. What it is kept from is put down.
move() {
    local next
    kill -0 "$load" || { echo "the client has ended before the migration"; cat "$scratch/load" "$scratch/load.err"; return 1; }
    migrate "$program" "$from" "$to" "$scratch/report" || return 1
    next=$from from=$to to=$next
    downtimes+=("$(jq '.frozen_ms | round' "$scratch/report")")
    kill -0 "$load" || { echo "the client has ended within the migration"; cat "$scratch/load" "$scratch/load.err"; return 1; }
}
moves() {
    check "it can go" on "$from" ferry check "$program" "$to"
    check "$program moves under its client" move
    check "and back" move
    check "and once more" move
}
stop() {
    on "$from" ferry delete -f "$program" || return 1
    on "$from" ip netns del "$program"
    for host in a b; do
        # shellcheck disable=SC2016
        on "$host" sh -c 'while umount "$1/rootfs" 2>/dev/null; do :; done; rm -rf "$1"' sh "$(bundle)"
    done
}

# A check without which all that follows would only say the same: `needed … || return 0`.
needed() { # WHAT COMMAND...
    check "$@"
    [ "$failed" = "$before" ]
}

# ---------------------------------------------------------------- clients

# loaded COMMAND...: a client in the background; what it says is in $scratch/load.
loaded() {
    "$top/contrib/lab" exec client "$@" >"$scratch/load" 2>"$scratch/load.err" </dev/null &
    load=$!
}
# asks OPTIONS: one of tests/programs/client.py; returns when all its connections have had an answer.
asks() {
    loaded python3 /srv/shared/client.py "$@" --to "$address"
    wait_until 30 said ready || { cat "$scratch/load" "$scratch/load.err"; return 1; }
}
said() { grep -q "$1" "$scratch/load"; }
# Its end, which is to be a success: by itself, or because it is told.
load_ends() { # [tell]
    local pid=$load status=0
    load=''
    [ -z "${1:-}" ] || kill "$pid"
    wait "$pid" || status=$?
    cat "$scratch/load.err"
    tail -n 30 "$scratch/load"
    [ "$status" = 0 ]
}
# asked JQ: of what the client has found.
asked() { tail -n 1 "$scratch/load" | jq -e "$1"; }
asking_ends() {
    check "the client ends well" load_ends tell
    check "it has had answers" asked '.answers > 100'
    check "none was wrong, no connection ended" asked '.wrong == 0 and .errors == []'
    gap=$(asked '"\(.silent_ms // .worst_ms | round) | \(.worst_ms | round)"' | tr -d '"')
}

# row: of what $how says, into the table.
row() {
    local pauses
    pauses=$(printf '%s, ' "${downtimes[@]}")
    [ "$failed" = "$before" ] || pauses=FAILED gap='|'
    table+=("| ${name:-$program} | $(version) | $how | ${pauses%, } | ${gap:-|} |")
}
version() { # of Debian's package
    # shellcheck disable=SC2016  # the dollar is dpkg's
    chroot "$image" dpkg-query -W -f '${Version}' "${package:-$program}" | sed 's/^[0-9]*://; s/[+-].*//'
}

check "three hosts come up" stage_up --programs a b client
goes_on
address=$net.60
image=$(lab root a)/srv/base
install -m 755 tests/programs/client.py "$shared/client.py"
for host in a b; do
    # Layers are not kept upon an overlay, which the hosts' roots are.
    on "$host" sh -c 'mkdir -p /etc/ferry && echo "state = \"/srv/local/ferry\"" >/etc/ferry/config.toml'
done

# shellcheck disable=SC2086  # words are wanted
[ $# != 0 ] || set -- $ALL
for program; do
    printf '\n-- %s\n' "$program"
    before=$failed package='' name='' how='' gap='' downtimes=()
    # shellcheck source=/dev/null
    . "tests/programs/$program.sh"
    if [ "$failed" != "$before" ]; then
        tail -n 20 "$(rootfs "$from")/log" 2>/dev/null
        [ -z "$load" ] || load_ends tell >/dev/null
    fi
    row
    check "$program ends" stop
done

printf '\n| program | version | how it was checked | frozen, ms | no client was answered for, ms | one waited for, ms |\n|---|---|---|---|---|---|\n'
printf '%s\n' "${table[@]}"
counted
