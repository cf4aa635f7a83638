#!/usr/bin/env bash
# Real services under their own clients, migrated in the middle of the load: redis under
# redis-benchmark, nginx under wrk and ab; over UDP an echo server, dnsmasq, and a game server under a
# player. Nothing may fail on the client.
# Needs root. Prints "N passed, N failed" and fails when something failed.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
# shellcheck source=contrib/lib.sh
. contrib/lib.sh
# shellcheck source=contrib/stage.sh
. contrib/stage.sh
# shellcheck source=tests/check.sh
. tests/check.sh
need_root

suite_begin services

# A container of a workload at $address, on host a.
start() { # WORKLOAD PORT [OPTIONS of bundles/make]
    local workload=$1 port=$2
    shift 2
    from=a to=b
    container_make a "$workload" "$workload" "$address" "$@" || return 1
    container_run a "$workload" || return 1
    wait_until 30 answers client "$address" "$port"
}
stop() { # WORKLOAD
    on "$from" runc delete -f "$1"
    on "$from" ip netns del "$1"
}

# To the other host, while the load is on.
move() { # NAME
    local next
    kill -0 "$load" || { echo "the load has ended before the migration"; return 1; }
    migrate "$1" "$from" "$to" "$scratch/report" || return 1
    next=$from from=$to to=$next
    kill -0 "$load" || { echo "the load has ended within the migration"; return 1; }
}

# loaded COMMAND...: a client in the background; what it says is in $scratch/load.
loaded() {
    "$top/contrib/lab" exec client "$@" >"$scratch/load" 2>"$scratch/load.err" </dev/null &
    load=$!
}
# Whether it holds so many connections.
connected() { [ "$(on client ss -Htn state established dst "$address" | wc -l)" -ge "$1" ]; }
# Its end, which is to be a success.
load_ends() {
    local pid=$load status=0
    load=''
    wait "$pid" || status=$?
    cat "$scratch/load.err"
    tail -n 30 "$scratch/load"
    [ "$status" = 0 ]
}
# `!` of a function's last command would not be its failure.
says_not() { ! grep -Ei "$1" "$scratch/load" "$scratch/load.err"; }

check "three hosts come up" stage_up a b client
goes_on
address=$net.60

# -- redis, 50 connections, three migrations
KEYS=5000
redis() { on client redis-cli -h "$address" "$@"; }
# Keys that no benchmark touches, their values made from their names.
redis_fill() {
    seq "$KEYS" | awk '{ printf "SET kept:%d value-%d-of-kept:%d\r\n", $1, $1 * 7919, $1 }' | redis --pipe
}
redis_compare() {
    seq "$KEYS" | awk '{ printf "value-%d-of-kept:%d\n", $1 * 7919, $1 }' >"$scratch/wanted"
    seq "$KEYS" | awk '{ printf "GET kept:%d\n", $1 }' | redis >"$scratch/found"
    cmp "$scratch/wanted" "$scratch/found"
}
benchmark() { # REQUESTS
    echo redis-benchmark -h "$address" -c 50 -n "$1" -r 10000 -d 100 -t set,get --csv
}
# How many requests keep it busy for as long as three migrations take: as many as the pace of this
# machine asks for, found by a short run.
redis_requests() {
    local began took
    began=$(now_ms)
    # shellcheck disable=SC2046
    on client $(benchmark 20000) >/dev/null </dev/null || return 1
    took=$(($(now_ms) - began))
    echo $((20000 * ${1:?} * 1000 / (took + 1)))
}
check "redis starts" start redis 6379
check "$KEYS keys are written" redis_fill
check "and are there" redis_compare
requests=$(redis_requests 8)
# shellcheck disable=SC2046
loaded $(benchmark "$requests")
check "redis-benchmark holds 50 connections" wait_until 10 connected 50
check "redis moves under redis-benchmark" move redis
check "and back" move redis
check "and once more" move redis
check "redis-benchmark ends well ($requests requests each)" load_ends
check "with no error" says_not 'error|refused|reset|closed|could not'
check "with both tests done" test "$(grep -cE '^"(SET|GET)"' "$scratch/load")" = 2
check "all keys are there with their values" redis_compare
check "redis says that it runs on $from" on "$from" sh -c 'runc state redis | grep running'
check "redis ends" stop redis

# -- redis with an append-only file on each host's own disk: its files are copied under the load
start_own() {
    from=a to=b
    EDIT='.process.args = ["/usr/bin/redis-server", "--save", "", "--appendonly", "yes", "--dir", "/data",
        "--enable-debug-command", "yes", "--bind", "0.0.0.0", "--protected-mode", "no"]' \
        container_make a own redis "$address" || return 1
    mkdir "$shared/own/rootfs/data" || return 1
    mv "$shared/own" "$(lab root a)/srv/local/own" || return 1
    container_run a own ferry /srv/local/own || return 1
    wait_until 30 answers client "$address" 6379
}
# As redis itself sees it.
aof_is_whole() { # HOST
    on "$1" sh -c 'redis-check-aof /srv/local/own/rootfs/data/appendonlydir/appendonly.aof.manifest </dev/null'
}
# What the host that it has left still has is as it was in the freeze, under the load.
move_own() { move own && aof_is_whole "$to"; }
check "redis starts with its files on a's own disk" start_own
check "$KEYS keys are written there" redis_fill
# shellcheck disable=SC2046
loaded $(benchmark "$requests")
check "redis-benchmark holds 50 connections again" wait_until 10 connected 50
check "redis moves with its files, whole ones, under redis-benchmark" move_own
check "and back with them" move_own
check "and once more with them" move_own
check "redis-benchmark ends well again" load_ends
check "with no error again" says_not 'error|refused|reset|closed|could not'
check "its append-only file is whole" aof_is_whole "$from"
# Everything is forgotten and read from the file again.
check "and redis loads it" test "$(redis DEBUG LOADAOF)" = OK
check "all keys are there out of the file" redis_compare
check "redis ends again" stop own

# -- nginx: read-only root, tmpfs, pages on shared storage; keep-alive connections
page_is_whole() { # FILE: what the server sends is what lies on the storage
    # shellcheck disable=SC2016
    on client bash -c 'exec 3<>"/dev/tcp/$1/80"; printf "GET /$2 HTTP/1.0\r\n\r\n" >&3; cat <&3' sh "$address" "$1" |
        sed '1,/^\r$/d' | cmp - "$shared/web/www/$1"
}
check "nginx starts" start web 80
page=$(cd "$shared/web/www" && find . -type f -printf '%s %P\n' | sort -n | head -n 1 | cut -d ' ' -f 2)
check "it serves $page" page_is_whole "$page"
# Its limit for an answer is 2 s by itself; all else would count as an error.
loaded wrk -t 1 -c 32 -d 10s --latency "http://$address/$page"
check "wrk holds 32 connections" wait_until 10 connected 32
check "nginx moves under wrk" move web
check "and back" move web
check "wrk ends well" load_ends
check "with no error and no timeout" says_not 'socket errors|non-2xx|unable'
check "with answers" grep -qE '[1-9][0-9]* requests in' "$scratch/load"
loaded ab -q -k -c 32 -t 10 -n 100000000 "http://$address/$page"
check "ab holds 32 connections" wait_until 10 connected 32
check "nginx moves under ab" move web
check "and back" move web
check "ab ends well" load_ends
check "with no failed request" grep -qE '^Failed requests: +0$' "$scratch/load"
check "with answers" grep -qE '^Complete requests: +[1-9]' "$scratch/load"
check "it still serves $page" page_is_whole "$page"
check "nginx ends" stop web

# -- UDP, to and fro and once more under each: a question every 2 ms, whatever became of those before.
# None may be lost. What comes in the freeze is kept; what the server has not read yet goes along; and a
# socket has room for some 270 of these, far more than are asked in a freeze, when nobody reads them.
udp_loaded() { # WHAT PORT OPTIONS of ferry-datagrams
    local what=$1 port=$2
    shift 2
    loaded /srv/shared/ferry-datagrams "$what" --to "$address:$port" --for 8s "$@" || return 1
    wait_until 10 grep -q ready "$scratch/load"
}
udp() { jq -s -e "last | $1" "$scratch/load"; }
udp_moves() { # NAME WHAT
    check "$1 moves under $2" move "$1"
    check "and back" move "$1"
    check "and once more" move "$1"
    check "the client of $1 ends well" load_ends
}
udp_all() { # NAME
    check "$1 has answered $(jq -s -r 'last | "\(.sent - .unanswered) of \(.sent), the slowest after \(.slowest_ms) ms"' "$scratch/load")" \
        udp '.sent > 3000 and .unanswered == 0'
    check "none late, twice or wrong" udp '.late == 0 and .twice == 0 and .wrong == 0'
    check "no host has refused" udp '.refused == 0'
    # What came in the freeze is older than that, and came before what was sent after it.
    check "none by what was asked later ($(jq -s -r 'last | "\(.overtaken) overtaken, by \(.overtaken_by_ms) ms"' "$scratch/load"))" \
        udp '.overtaken_by_ms < 10'
    check "$1 ends" stop "$1"
}
# Listening, and answering: of UDP only a client knows. `start` asks by TCP.
start_udp() { # WORKLOAD
    from=a to=b
    container_make a "$1" "$1" "$address" --base "$(lab root a)" || return 1
    container_run a "$1"
}
cp "$top/target/bundles/bin/ferry-datagrams" "$shared/"
check "the echo server starts" start echo 7007
check "a client asks it by UDP" udp_loaded ask 7007
udp_moves echo "500 datagrams a second"
udp_all echo

check "dnsmasq starts" start dns 53
check "a client asks it for names" udp_loaded ask 53 --as dns
udp_moves dns "500 queries a second"
udp_all dns

# A player who is in the game: 50 inputs a second, each answered with its timing; 25 snapshots. Those
# missed are of the time in which the server stood still, and of no more: two of them fill 80 ms.
check "a game server starts" start_udp teeworlds
check "a player comes in" udp_loaded play 8303
udp_moves teeworlds "a player"
check "the player was there all the time ($(jq -s -r 'last | "\(.missed) of \(.snapshots) snapshots missed, the longest silence \(.silence_ms) ms"' "$scratch/load"))" \
    udp '.reconnects == 0 and .snapshots > 100 and .heard_in_chat'
check "no input is lost" udp '.inputs > 300 and .inputs_unanswered == 0'
check "no snapshot is missed but of the time it stood still" udp '.missed <= 3 * (.silence_ms / 40 + 1)'
check "no host has refused" udp '.refused == 0'
check "the game server ends" stop teeworlds

counted
