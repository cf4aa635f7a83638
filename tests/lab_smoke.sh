#!/usr/bin/env bash
# Proves that a host of contrib/lab is as good as a machine for what Ferry does: ssh, runc, CRIU,
# macvlan, shared storage; and that nothing is left of a lab that was taken down.
# Needs root. Prints "N passed, N failed" and fails when something failed.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
# shellcheck source=contrib/lib.sh
. contrib/lib.sh
# shellcheck source=tests/check.sh
. tests/check.sh
need_root

export FERRY_LAB=smoke$$
unset FERRY_LAB_DIR
lab() { contrib/lab "$@"; }
on() { lab exec "$@"; }
scratch=$(mktemp -d)
trap 'lab down; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

is() { [ "$1" = "$2" ] || { printf 'wanted: %s\nfound:  %s\n' "$2" "$1"; return 1; }; }
exits() { # STATUS COMMAND...
    local wanted=$1
    shift
    "$@"
    is "$?" "$wanted"
}
fails() { ! "$@"; }

printf '#!/bin/sh\necho first ferry\n' >"$scratch/ferry1"
printf '#!/bin/sh\necho second ferry\n' >"$scratch/ferry2"
chmod +x "$scratch"/ferry?
check "three hosts come up" lab up --ferry "$scratch/ferry1" a b client
goes_on
check "a second lab of that name is refused" fails lab up a

# -- entering
check "exec hands standard input and output through" is "$(echo through | on a cat)" through
check "exec hands the exit status through" exits 7 on a sh -c 'exit 7'
# shellcheck disable=SC2016
check "exec dies of the signal that the command died of" exits 143 on a sh -c 'kill -TERM $$'
check "exec of what is not there exits 127" exits 127 on a no-such-program
# shellcheck disable=SC2016
check "exec passes only the environment it is told" \
    is "$(LEAK=1 on --env K=V a sh -c 'echo $K$LEAK')" V
signalled() {
    contrib/lab exec a sh -c 'trap "exit 9" TERM; echo up >/tmp/signal; while :; do sleep 0.05; done' &
    wait_until 5 on a test -e /tmp/signal && kill -TERM $! && exits 9 wait $!
}
check "a signal to exec reaches the command" signalled
many() {
    local i jobs=()
    for i in {1..20}; do on a sh -c "exit $i" & jobs+=($!); done
    for i in {1..20}; do exits "$i" wait "${jobs[i - 1]}" || return 1; done
}
check "twenty at once each get their own status" many
check "a host sees its own processes and name" is "$(on a sh -c 'hostname; ps -o comm= 1')" $'a\nsleep'
check "its processes are in groups that do not climb out" \
    fails on a grep -F .. /proc/self/cgroup
orphan() {
    on a sh -c '(true & exec sh -c "exit 0") & wait; setsid sh -c "true &"'
    fails on a sh -c 'ps -eo pid,ppid,stat,comm | grep " Z"'
}
check "orphans are reaped" wait_until 5 orphan
check "ferry is there" is "$(on b ferry)" "first ferry"
check "another ferry can be installed" lab ferry "$scratch/ferry2"
check "and is there in all hosts" is "$(on a ferry; on b ferry)" $'second ferry\nsecond ferry'

# -- between the hosts
addr_b=$(lab addr b)
check "ping by name" on a ping -c 1 -W 2 b
check "ping by IPv6" on a ping -c 1 -W 2 b6
check "ssh from a to b asks nothing" is "$(on a ssh b hostname)" b
check "ssh by address, IPv6, and as another name of it" is "$(on a ssh "$addr_b" hostname; on a ssh b6 hostname)" $'b\nb'
check "ssh hands streams and status through" exits 5 on a sh -c 'echo x | ssh b "grep -q x && exit 5"'
# shellcheck disable=SC2016
check "ssh finds the usual PATH" is "$(on a ssh b 'command -v runc criu ferry | wc -l')" 3
check "what a writes to /srv/shared, b reads" \
    is "$(on a sh -c 'echo together >/srv/shared/f'; on b cat /srv/shared/f)" together
check "/srv/local is each host's own" fails on b sh -c 'ssh a touch /srv/local/mine; test -e /srv/local/mine'
check "storage is no overlay" fails on a sh -c 'stat -f -c %T /srv/local /srv/shared /var/lib/containers | grep overlay'

# -- links
check "a link can be cut" lab link b --cut
check "and nothing passes" fails on a ping -c 1 -W 1 b
check "and mended" lab link b --mend
check "and all passes" wait_until 5 on a ping -c 1 -W 1 b
send() { # milliseconds that 4 MB take from a to b
    local t
    t=$(now_ms)
    on a sh -c 'head -c 4M /dev/zero | ssh b "cat >/dev/null"'
    echo $(($(now_ms) - t))
}
check "a link can be given a rate" lab link b --rate 20mbit
slow=$(send)
# No more than a lower limit: 32 Mbit take 1600 ms however fast the machine is.
check "and has no more than that ($slow ms)" test "$slow" -gt 1300
check "and be freed of it" lab link b --rate off
round_trip() { # milliseconds, of the second: the first asks for the address, too
    on a ping -c 2 -W 2 b | sed -n 's/.*icmp_seq=2.* time=\([0-9]*\).*/\1/p'
}
check "a link can be made long" lab link b --delay 30
far=$(round_trip)
check "and takes that time, both ways ($far ms)" test "$far" -ge 60
check "and what passes is whole" is "$(on a sh -c 'seq 1000000 | ssh b md5sum')" "$(seq 1000000 | md5sum)"
check "and be short again" lab link b --delay off
check "and all passes as before" wait_until 5 on a ping -c 1 -W 1 b

# -- a host that goes down
boot_id() { on a cat /proc/sys/kernel/random/boot_id; }
on a sh -c 'echo kept | tee /srv/local/disk >/var/lib/disk; touch /run/lost /tmp/lost; ip netns add lost; sleep 1000 &' >/dev/null
before=$(boot_id) mac=$(on a cat /sys/class/net/eth0/address)
check "a host can be started again" lab reboot a
check "nothing runs of what ran" is "$(on a ps -eo comm= | sort | tr '\n' ' ')" "ps sleep sshd "
check "its disk is as it was" is "$(on a cat /srv/local/disk /var/lib/disk)" $'kept\nkept'
check "what was in memory is gone" fails on a sh -c 'ls /run/lost || ls /tmp/lost || ls /run/netns/lost'
check "it tells another boot_id" fails is "$(boot_id)" "$before"
check "its hardware address is what it was" is "$(on a cat /sys/class/net/eth0/address)" "$mac"
check "it is as reachable as before, and reaches others" is "$(on b ssh a ssh b hostname)" b
check "and has its ferry" is "$(on a ferry)" "second ferry"

# -- runc and CRIU
check "criu check" on a criu check
cat >"$scratch/bundle.sh" <<'TXT'
set -eu
mkdir -p /srv/local/box/rootfs /srv/local/box/data
mount --bind / /srv/local/box/rootfs
cd /srv/local/box
rm -f config.json
runc spec
python3 - <<'PY'
import json
c = json.load(open("config.json"))
c["process"]["terminal"] = False
# Counts in its own memory: what goes on counting was restored, what begins at 1 was not.
# No shell: one that is frozen in the vfork of a `sleep` waits in state D, and CRIU cannot dump it.
c["process"]["args"] = ["/usr/bin/perl", "-e",
    "while (1) { $i++; open F, '>/mnt/next'; print F $i; close F;"
    "rename '/mnt/next', '/mnt/count'; select undef, undef, undef, 0.02 }"]
c["linux"].pop("resources", None)
c["mounts"].append({"destination": "/mnt", "type": "bind", "source": "/srv/local/box/data", "options": ["bind", "rw"]})
json.dump(c, open("config.json", "w"))
PY
TXT
count() { on a cat /srv/local/box/data/count; }
counted_past() { local n; n=$(count) && [ "${n:-0}" -gt "$1" ]; }
status() { on a runc state box | grep -q "\"status\": \"$1\""; }
check "a bundle" on a sh -c "$(cat "$scratch/bundle.sh")"
check "runc run" on a sh -c 'runc run -d -b /srv/local/box box </dev/null >/dev/null 2>&1'
check "the container runs" wait_until 10 counted_past 5
check "runc checkpoint" on a sh -c 'cd /srv/local/box && runc checkpoint --image-path image --work-path work box || { tail -n 20 work/dump.log; exit 1; }'
check "the container is gone" fails on a runc state box
before=$(count)
check "runc restore" on a sh -c 'cd /srv/local/box && runc restore -d --image-path image --work-path work box </dev/null >/dev/null 2>err || { cat err; tail -n 20 work/restore.log; exit 1; }'
check "the container is running" status running
check "it goes on where it stopped (at $before)" wait_until 10 counted_past "$before"
check "runc delete" on a runc delete -f box

# -- a container's own network
address=${addr_b%.*}.50
cat >"$scratch/macvlan.sh" <<TXT
set -eu
ip netns add web
ip link add link eth0 name web0 netns web type macvlan mode bridge
ip -n web addr add $address/24 dev web0
ip -n web link set web0 up
TXT
check "a namespace with a macvlan over eth0" on a sh -c "$(cat "$scratch/macvlan.sh")"
check "is reached from another host" on client ping -c 1 -W 2 "$address"
check "the namespace is deleted" on a ip netns del web
# The kernel takes it apart on its own time.
check "and is not reached when it is gone" wait_until 10 fails on client ping -c 1 -W 1 "$address"
check "an address moves" on b sh -c "$(cat "$scratch/macvlan.sh"); ip netns exec web ping -c 1 -W 2 client"
check "and is reached where it went" wait_until 5 on client ping -c 1 -W 1 "$address"

# -- another lab beside it, without shared storage and with other links
export FERRY_LAB=smoke$$-two
check "a second lab comes up beside it" lab up --no-shared --mtu 1400 --ferry "$scratch/ferry1" a c
check "without shared storage" fails on a test -e /srv/shared
check "with its MTU" is "$(on a cat /sys/class/net/eth0/mtu)" 1400
check "in another network" fails is "$(lab addr a)" "$(lab --state "smoke$$" addr a)"
check "it goes down" lab down
check "twice" lab down
check "and up again" lab up a
lab down
export FERRY_LAB=smoke$$
check "the first one is still there" on a ssh b true

# -- one that dies half way, one whose host died
check "up of a broken base fails" fails env FERRY_LAB_BASE="$scratch" FERRY_LAB=smoke$$-bad contrib/lab up a
pids=$(find /sys/fs/cgroup -path "*ferry-lab.smoke$$.*" -name cgroup.procs -exec cat {} + | sort -u)
check "there were processes" test -n "$pids"
kill -KILL "$(lab pid b)"
check "exec in a host that died says so" exits 125 on b true
on a sh -c 'setsid sleep 1000 & exit 0'
check "down" lab down

# -- what root builds
theirs() { # WHAT OWNER: of what is in a target/ when a script has ended that sudo has called as 1234:2345
    mkdir -p "$scratch/tree/target/debug"
    touch "$scratch/tree/target/debug/built" "$scratch/tree/target/debug/own"
    chown 99 "$scratch/tree/target/debug/own"
    ln -sf "$scratch/ferry1" "$scratch/tree/target/link"
    # shellcheck disable=SC2016
    env SUDO_UID=1234 SUDO_GID=2345 CARGO_TARGET_DIR= bash -euc '. contrib/stage.sh; top=$1; give_back' sh "$scratch/tree"
    is "$(stat -c %u:%g "$scratch/tree/$1")" "$2"
}
check "is given back to whoever called sudo" theirs target/debug/built 1234:2345
check "but what belongs to others" theirs target/debug/own 99:0
check "and nothing beside it" theirs ../ferry1 0:0

# -- nothing is left
left() { [ -z "$1" ] || { printf '%s\n' "$1"; return 1; }; }
check "no mounts" left "$(grep "smoke$$" /proc/self/mountinfo)"
check "no groups" left "$(find /sys/fs/cgroup -name "ferry-lab.smoke$$*")"
check "no files" left "$(find /run/ferry-lab /var/lib/ferry-lab -maxdepth 1 \( -name "*smoke$$*" -o -lname "*smoke$$*" \) 2>/dev/null)"
alive() { local p; for p in $pids; do ! start_time "$p" || echo "$p"; done; }
check "no processes" left "$(alive)"
check "no network devices" left "$(ip -br link | grep -E '^(a|b|client|br0)[@ ]')"

counted
