#!/usr/bin/env bash
# Migrations between virtual machines with Debian's own kernels, systemd and AppArmor: what a lab of namespaces
# has not got. Each is under a client whose connections must last and whose answers must be right.
#
#   tests/machines.sh [NAME]...     all, or these
#
# Needs root, and faults to inject in FERRY_BIN. Prints "N passed, N failed", and fails when something failed.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
# shellcheck source=contrib/lib.sh
. contrib/lib.sh
hosts_by=$PWD/contrib/vm
# shellcheck source=contrib/stage.sh
. contrib/stage.sh
# shellcheck source=tests/check.sh
. tests/check.sh
need_root

ALL='kernels apparmor systemd limits source_dies destination_dies'
for trial; do
    case " $ALL " in *" $trial "*) ;; *) die "no such trial: $trial (there are: $ALL)" ;; esac
done
suite_begin machines

# ---------------------------------------------------------------- containers

# make EDIT [OPTION]: $name on host a, whose eth0 the network is a macvlan of, named eth0 in it; and a client. Its bundle
# is on the host's own disk. EDIT is a jq program for config.json, OPTION one of Ferry's for `run`.
make() {
    from=a to=b
    netns_make a "$name" "$address" || return 1
    bundles/make --netns "/run/netns/$name" counter "$scratch/$name" || return 1
    jq '.process.args = ["/counter-server", "--memory", "8M"] | '"$1" "$scratch/$name/config.json" >"$scratch/config.json" || return 1
    mv "$scratch/config.json" "$scratch/$name/config.json"
    tar -C "$scratch" -c "$name" | on a tar -C /srv -x || return 1
    # shellcheck disable=SC2016  # the dollars are the host's
    on a sh -c 'ferry $2 --log /run/run.log run -d -b "/srv/$1" "$1" </dev/null >/dev/null 2>&1 ||
        { cat /run/run.log; exit 1; }' sh "$name" "${2:-}" || return 1
    wait_until 300 answers client "$address" 7000 || return 1
    talk_start client "$top/target/bundles/bin/ferry-probe" --to "$address:7000" --connections 3 --every 50ms \
        --give-up 1800s --verify
}
move() { # [OPTIONS]
    local next
    migrate "$name" "$from" "$to" "$scratch/report" "$@" || return 1
    next=$from from=$to to=$next
}
# The client's verdict, and the container's end.
finish() {
    check "its client is answered" probe_steady 600
    check "no connection is lost, no answer wrong" sound
    check "its memory is right" probe_end
    check "it ends" on "$from" ferry delete -f "$name"
    on "$from" ip netns del "$name"
}
sound() { probe_report start | tee "$scratch/out" | jq -e '.connections_lost == 0 and .wrong_answers == 0 and .answers > 0'; }

# in_task COMMAND: on the host where it is, with the number of its first process as $1.
in_task() {
    # shellcheck disable=SC2016
    on "$from" sh -c 'pid=$(ferry state "$1" | jq .pid) && sh -euc "$2" sh "$pid"' sh "$name" "$1"
}
# What its control group says of these limits.
limits() { # FILE...
    # shellcheck disable=SC2016
    in_task 'cd "/sys/fs/cgroup$(cut -d : -f 3 /proc/$1/cgroup)" && grep . '"$*"
}
is() { [ "$1" = "$2" ] || { printf 'is: %s\nand not: %s\n' "$1" "$2"; return 1; }; }
exits() { # STATUS WORDS COMMAND...: with this status, and these words
    local status=0 wanted=$1 words=$2
    shift 2
    "$@" >"$scratch/said" 2>&1 || status=$?
    cat "$scratch/said"
    [ "$status" = "$wanted" ] && grep -qF "$words" "$scratch/said"
}
# The hosts that have it.
where() {
    local host
    for host in a b; do
        [ "$(on "$host" ferry state "$name" 2>/dev/null | jq -r .status)" != running ] || printf '%s ' "$host"
    done
}

# ---------------------------------------------------------------- trials

# Kernels of two suites: the older one takes the name of an interface for one of the host's, and their vDSOs differ,
# so that from the first move on the task has one of another kernel.
kernels() {
    check "a container starts" make .
    check "it moves to a newer kernel" move
    check "and back" move --verify
    check "and once more" move --verify
    finish
}

profile() { # HOST
    on "$1" tee "/etc/apparmor.d/ferry-machines" >/dev/null <<'TXT'
abi <abi/4.0>,
profile ferry-machines flags=(attach_disconnected, mediate_deleted) {
    file,
    network,
    capability,
    signal,
    unix,
    deny /etc/shadow rwklx,
}
TXT
    on "$1" apparmor_parser -r /etc/apparmor.d/ferry-machines
}
# shellcheck disable=SC2016
confined() { is "$(in_task 'cat /proc/$1/attr/apparmor/current')" "ferry-machines (enforce)"; }
apparmor() {
    local before
    check "a profile is loaded on a" profile a
    check "and on b" profile b
    check "a container starts" make '.process.apparmorProfile = "ferry-machines"'
    check "it moves" move
    check "it is confined there" confined
    check "the profile is taken from a" on a apparmor_parser -R /etc/apparmor.d/ferry-machines
    # shellcheck disable=SC2016
    before=$(in_task 'echo $1')
    check "ferry check says so" exits 3 "AppArmor profile" on b ferry check "$name" a
    check "ferry migrate refuses" exits 3 "AppArmor profile" on b ferry migrate "$name" a
    # shellcheck disable=SC2016
    check "the container is as it was" is "$(in_task 'echo $1')" "$before"
    check "and nowhere else" is "$(where)" "b "
    finish
}

systemd() {
    local before files='memory.max memory.swap.max pids.max cpu.max cpu.weight'
    check "a container starts in a scope" make '.linux.cgroupsPath = "system.slice:ferry:systemd" | .linux.resources = {
        memory: {limit: 100003840, swap: 100003840}, pids: {limit: 40}, cpu: {quota: 50000, period: 100000, shares: 512}}' \
        --systemd-cgroup
    before=$(limits "$files"; scope)
    check "it has limits" grep -F memory.max:100003840 <<<"$before"
    check "it moves" move
    check "its scope is active there" on b systemctl is-active ferry-systemd.scope
    check "its limits are the same" is "$(limits "$files"; scope)" "$before"
    finish
}
scope() { on "$from" systemctl show ferry-systemd.scope -p MemoryMax -p TasksMax -p CPUQuotaPerSecUSec -p CPUWeight; }

limits_changed() { jq -e --arg word "$1" '[.changed[]? | tostring | select(contains($word))] | length > 0' "$scratch/report"; }
limits_trial() {
    check "a container starts" make '.linux.resources = {memory: {limit: 67108864}}'
    check "its limits are changed" on a ferry update --memory 100003840 --memory-swap 100003840 --pids-limit 33 "$name"
    check "ferry check tells" exits 0 "pids.max (33, and no limit)" on a ferry check "$name" b
    check "it moves" move
    check "the report tells of the one that has changed" limits_changed "memory.max"
    check "and of the one that is new" limits_changed "pids.max"
    check "they are config.json's there" is "$(limits memory.max pids.max)" $'memory.max:67108864\npids.max:max'
    finish
}

# held POINT: a migration that has come as far as that, in the background.
held() {
    on a env "FERRY_FAULT=$1:hold" ferry migrate "$name" b >"$scratch/held" 2>&1 </dev/null &
    load=$!
    while kill -0 "$load" 2>/dev/null; do
        ! await_on a 30 test -e "/run/ferry-fault/$1" || return 0
    done
    cat "$scratch/held"
    return 1
}
# await_on HOST SECONDS COMMAND...: asked there, since each ssh takes from an emulated processor what it has to wait for.
await_on() {
    local host=$1 seconds=$2
    shift 2
    # shellcheck disable=SC2016
    on "$host" timeout "$seconds" sh -c 'until "$@"; do sleep 0.2; done' sh "$@"
}
ends() { wait "$load" || true; load=''; }

# The source's plug is pulled when the destination holds a copy and the source has not committed: the copy there is
# the only one.
source_dies() {
    check "a container starts" make .
    check "a migration comes to its commit" held source.commit
    check "the source's plug is pulled" lab plug a
    ends
    check "the copy is held" exits 0 "held here" on b ferry migrations
    check "the source boots" lab boot a
    check "the destination alone does not let it run" exits 4 "waits for the source's word" on b ferry resolve "$name"
    check "the source finds it there" exits 0 "runs on the other host" on a ferry resolve "$name"
    from=b to=a
    check "there is one, on the destination" is "$(where)" "b "
    check "nothing is open there" exits 0 "it runs here" on b ferry migrations
    finish
}

# The destination's plug is pulled in the freeze: the container stays, and what was made there is settled at boot.
destination_dies() {
    check "a container starts" make .
    check "b settles at boot" settles_at_boot b
    check "a migration is in its freeze" held source.sent
    check "the destination's plug is pulled" lab plug b
    check "the migration goes on" on a rm /run/ferry-fault/source.sent
    ends
    check "it is given up" grep -qF "runs on here" "$scratch/held"
    check "its client is answered" probe_steady 600
    check "the destination boots" lab boot b
    check "its open migrations are settled" await_on b 300 sh -c 'ferry migrations | grep -qF "stayed where it was"'
    # shellcheck disable=SC2016
    check "by systemd" await_on b 300 sh -c '[ -n "$(systemctl show ferry-resolve -p ExecMainExitTimestamp --value)" ]'
    check "which had no failure" is "$(on b systemctl show ferry-resolve -p ExecMainStatus -p Result | sort | tr '\n' ' ')" \
        "ExecMainStatus=0 Result=success "
    check "there is one, on the source" is "$(where)" "a "
    finish
}
settles_at_boot() { # HOST
    on "$1" tee /etc/systemd/system/ferry-resolve.service <contrib/systemd/ferry-resolve.service >/dev/null &&
        on "$1" systemctl enable ferry-resolve.service && on "$1" sync
}

# ---------------------------------------------------------------- main

check "two machines boot" lab up --ferry "${FERRY_BIN:-target/faults/ferry}" a@trixie b
goes_on
number=40
# shellcheck disable=SC2086  # words are wanted
[ $# != 0 ] || set -- $ALL
for trial; do
    printf '\n-- %s\n' "$trial"
    # Interfaces are called after it, whose names are short.
    number=$((number + 1)) name=m$number
    address=10.77.0.$number
    case $trial in limits) limits_trial ;; *) "$trial" ;; esac
done
counted
