#!/usr/bin/env bash
# Moves a container the way the articles on CRIU have it since 2016: checkpoint, rsync, restore.
# Runs on the source, as root; bundle and root file system lie on storage that both hosts see.
#
# usage: by-script.sh CONTAINER DESTINATION BUNDLE ADDRESS MAC
#
# Better than the articles in two things, without which connections break: nothing reaches the
# address on the destination while no container is behind it (the kernel would answer with RST), and
# the namespace there has been made beforehand. The only output is one line of JSON.
set -euo pipefail
export LC_ALL=C # EPOCHREALTIME has a decimal point
name=$1 destination=$2 bundle=$3 address=$4 mac=$5
images=/srv/local/images.$name

now_us() { echo "${EPOCHREALTIME/./}"; }
began=$(now_us)

# The same namespace there, with its link still down. A fence in it, since with the link there is an
# address, and a kernel that knows of no connection.
# shellcheck disable=SC2087  # the variables are this side's
ssh "$destination" sh -eu >&2 <<TXT
ip netns del $name 2>/dev/null || true
rm -rf $images
mkdir -p $images
ip netns add $name
ip link add link eth0 name $name.0 address $mac netns $name type macvlan mode bridge
ip -n $name link set $name.0 name eth0
ip -n $name link set lo up
ip netns exec $name nft 'add table inet fence; add chain inet fence in { type filter hook input priority -300; policy drop; }'
TXT

rm -rf "$images"
mkdir -p "$images"
frozen=$(now_us)
runc checkpoint --tcp-established --image-path "$images" --work-path "$images/work" "$name" >&2 ||
    { tail -n 20 "$images/work/dump.log" >&2; exit 1; }
ip -n "$name" link set eth0 down
rsync -a "$images/" "$destination:$images/" >&2
# shellcheck disable=SC2087
ssh "$destination" sh -eu >&2 <<TXT
ip -n $name addr add $address/24 dev eth0
ip -n $name link set eth0 up
runc restore -d --tcp-established --image-path $images --work-path $images/work -b $bundle $name </dev/null >/dev/null 2>&1 ||
    { tail -n 20 $images/work/restore.log; exit 1; }
# The fence, and what CRIU's own lock of the network has left behind.
ip netns exec $name nft flush ruleset
ip netns exec $name python3 - $address <<'PY'
# A gratuitous ARP, so that switches and neighbours learn the new place.
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
mac, ip = s.getsockname()[4], socket.inet_aton(sys.argv[1])
s.send(b"\xff" * 6 + mac + b"\x08\x06" + b"\x00\x01\x08\x00\x06\x04\x00\x01" + mac + ip + b"\x00" * 6 + ip)
PY
TXT
running=$(now_us)
ip netns del "$name"
rm -rf "$images"
printf '{"frozen_ms": %d, "total_ms": %d}\n' $(((running - frozen) / 1000)) $((($(now_us) - began) / 1000))
