# shellcheck shell=bash
# What the network costs a client beyond the freeze itself: read by contrib/bench, which has `prepare`
# and the rest, and the variables that seem to come from nowhere.
# shellcheck disable=SC2154
#
# Of a busy client the longest gap between two answers, of a quiet one its slowest answer: one of its
# questions comes in every freeze, on a connection that is idle otherwise.

# What, the workload and its port, and a client that has said `ready`.
GAPS="busy-tcp:counter:7000 quiet-tcp:counter:7000 busy-udp:echo:7007 quiet-udp:echo:7007"

gap_client() { # KIND PORT
    case $1 in
        busy-tcp) probe_start client "$address:$2" --connections 1 --every 2ms ;;
        # In turn: a question every 20 ms.
        quiet-tcp) probe_start client "$address:$2" --connections 50 --every 1s ;;
        busy-udp) talk_start client /srv/shared/ferry-datagrams ask --to "$address:$2" --every 2ms ;;
        quiet-udp) talk_start client /srv/shared/ferry-datagrams ask --to "$address:$2" --every 20ms ;;
    esac
}

# In milliseconds.
gap_seen() { # KIND
    case $1 in
        busy-tcp) probe_report move | jq .worst_pause_ms ;;
        quiet-tcp) probe_report move | jq .latency_ms.max ;;
        busy-udp) probe_ask silence_ms report | jq .silence_ms ;;
        quiet-udp) probe_ask silence_ms report | jq .slowest_ms ;;
    esac
}

# Whether all that was asked in the freeze is answered.
gap_over_tcp() { probe_report now | jq -e '.answers >= .connections' >/dev/null; }
gap_over_udp() { probe_ask sent report | jq -e '.unanswered <= 1' >/dev/null; }

gap() {
    local one kind workload port i next
    prepare
    install -m 755 "$top/target/bundles/bin/ferry-datagrams" "$shared/ferry-datagrams"
    echo
    for one in $GAPS; do
        IFS=: read -r kind workload port <<<"$one"
        clear_away
        container_make a "$NAME" "$workload" "$address"
        container_run a "$NAME"
        wait_until 30 answers client "$address" "$port" || die "the server does not answer"
        from=a to=b
        gap_client "$kind" "$port" || die "the client has no answer"
        for ((i = 1; i <= times; i++)); do
            probe_mark move
            migrate "$NAME" "$from" "$to" "$scratch/report" || die "migration $i failed"
            # Of UDP a second mark would forget what is to be read.
            case $kind in *-tcp) probe_mark now ;; esac
            wait_until 30 "gap_over_${kind#*-}" || die "the client is not answered after migration $i"
            jq -c --arg client "$kind" --argjson run "$i" --argjson gap "$(gap_seen "$kind")" \
                '{client: $client, run: $run, gap_ms: $gap, frozen_ms, packets}' "$scratch/report" >>"$scratch/rows"
            next=$from from=$to to=$next
        done
        probe_end >/dev/null 2>&1 || true
        jq -s -r --arg client "$kind" '
            def median: sort | (.[((length - 1) / 2) | floor] + .[(length / 2) | floor]) / 2;
            def short: . * 10 | round / 10;
            map(select(.client == $client)) | map(.gap_ms - .frozen_ms) as $over
            | "  \(.[0].client): \(length) migrations, gap \(map(.gap_ms) | median | short) ms, frozen \(map(.frozen_ms) | median | short) ms, gap minus frozen \($over | median | short) ms at the median, \($over | max | short) at most"' "$scratch/rows"
    done
    [ -z "$json" ] || jq -s . "$scratch/rows" >"$json"
}

