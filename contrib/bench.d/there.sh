#!/usr/bin/env bash
# The destination's part of contrib/bench.d/by-*.
#
# usage: there.sh CONTAINER ADDRESS ACTION …
#   prepare IMAGES MAC        the same namespace, with its link still down; room for images
#   arrive COMMAND…           link up, the command that restores, then the fence away
set -euo pipefail
name=$1 address=$2 action=$3
shift 3

case $action in
    prepare)
        ip netns del "$name" 2>/dev/null || true
        rm -rf "$1"
        mkdir -p "$1/work"
        ip netns add "$name"
        ip link add link eth0 name "$name.0" address "$2" netns "$name" type macvlan mode bridge
        ip -n "$name" link set "$name.0" name eth0
        ip -n "$name" link set lo up
        # With the link there is an address, and a kernel that knows of no connection.
        ip netns exec "$name" nft 'add table inet fence; add chain inet fence in { type filter hook input priority -300; policy drop; }'
        ;;
    arrive)
        ip -n "$name" addr add "$address/24" dev eth0
        ip -n "$name" link set eth0 up
        "$@" </dev/null
        # The fence, and what CRIU's own lock of the network has left behind.
        ip netns exec "$name" nft flush ruleset
        ip netns exec "$name" python3 - "$address" <<'PY'
# A gratuitous ARP, so that switches and neighbours learn the new place.
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
mac, ip = s.getsockname()[4], socket.inet_aton(sys.argv[1])
s.send(b"\xff" * 6 + mac + b"\x08\x06" + b"\x00\x01\x08\x00\x06\x04\x00\x01" + mac + ip + b"\x00" * 6 + ip)
PY
        ;;
    *) echo "there.sh: no such action: $action" >&2; exit 2 ;;
esac
