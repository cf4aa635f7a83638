# shellcheck shell=bash
# What each established connection adds to the pause: read by contrib/bench, which has `prepare` and
# the rest, and the variables that seem to come from nowhere.
# shellcheck disable=SC2034,SC2154
#
# The same server holds few connections, or many, most of them idle, and moves to and fro. Ten more
# connections, which ask all the time, tell how long it was away.

# One of so many asks every 20 ms, the others every 10 s.
BUSY=50
COUNTS="0 100 10000"

# crowd_start NAME COUNT EVERY: a client that holds connections until `crowd_end`.
crowd_start() {
    local fd
    rm -f "$scratch/$1.in"
    mkfifo "$scratch/$1.in"
    "$top/contrib/lab" exec client /srv/shared/ferry-probe --to "$address:7000" --connections "$2" --every "$3" \
        --give-up 2m --json "/srv/shared/$1.json" <"$scratch/$1.in" >"$scratch/$1.out" 2>"$scratch/$1.err" &
    crowd_pids+=($!)
    exec {fd}>"$scratch/$1.in"
    crowd_fds+=("$fd")
    crowds+=("$1")
    wait_until 60 grep -q '"ready"' "$scratch/$1.out" || { cat "$scratch/$1.err" >&2; die "the connections do not stand"; }
}

# Every one of them has to have an answer, once more, since the last migration.
crowd_await() {
    local fd name
    for fd in "${crowd_fds[@]}"; do echo 'mark end' >&"$fd"; done
    for name in "${crowds[@]}"; do wait_until 60 crowd_answered "$name" || die "not all connections are answered"; done
}
crowd_end() {
    local fd
    # Their ends of file would not come: whoever was started later has inherited the pipes.
    for fd in "${crowd_fds[@]}"; do
        echo quit >&"$fd"
        exec {fd}>&-
    done
    [ ${#crowd_pids[@]} = 0 ] || wait "${crowd_pids[@]}" || true
    crowd_pids=() crowd_fds=()
}
crowd_answered() {
    local i lines
    lines=$(wc -l <"$scratch/$1.out")
    for i in "${!crowds[@]}"; do [ "${crowds[i]}" != "$1" ] || echo 'report since end' >&"${crowd_fds[i]}"; done
    wait_until 20 crowd_has "$1" $((lines + 1)) || return 1
    # One without any answer has a pause as long as the time since the mark, or longer.
    tail -n 1 "$scratch/$1.out" | jq -e '.since == "end" and .answers >= .connections and .worst_pause_ms < .window_ms' >/dev/null
}
crowd_has() { [ "$(wc -l <"$scratch/$1.out")" -ge "$2" ]; }

crowd_lost() {
    [ ${#crowds[@]} != 0 ] || { echo '{"connections": 0, "lost": 0, "wrong": 0}'; return; }
    local name
    for name in "${crowds[@]}"; do cat "$shared/$name.json"; done |
        jq -s -c '{connections: map(.connections) | add, lost: map(.connections_lost) | add, wrong: map(.wrong_answers) | add}'
}

connections_run() { # COUNT RUN
    local next
    probe_mark move
    move_ferry || { cat "$scratch/why" >&2; die "it did not move"; }
    probe_steady || die "the client gets no steady answers afterwards"
    probe_report move >"$scratch/window"
    jq -n -c --argjson count "$1" --argjson run "$2" --slurpfile report "$scratch/report" \
        --slurpfile moved "$scratch/moved" --slurpfile window "$scratch/window" '
        $report[0] as $m | ($m.arrival | map({key: .[0], value: .[1]}) | from_entries) as $at
        | ($m.source | map({key: .name, value: .at_ms}) | from_entries) as $here
        # Only many are carried by Ferry.
        | (if $m.connections then $here["connections are taken out"] - $here["frozen, fence closed"] else 0 end) as $take
        | (if $m.connections then $at["connections landed"] - $at["restored"] else 0 end) as $land
        # From the commit until all sockets are out of repair mode.
        | ($at["sockets alive"] - $at["commit"]) as $wake | {
            connections: $count, run: $run, carried: ($m.connections // 0),
            pause_ms: $window[0].worst_pause_ms, frozen_ms: $m.frozen_ms,
            take_ms: $take, criu_dump_ms: $m.criu_ms.dump, criu_restore_ms: $m.criu_ms.restore, land_ms: $land,
            wake_ms: $wake, rest_ms: ($m.frozen_ms - $take - $m.criu_ms.dump - $m.criu_ms.restore - $land - $wake),
            total_ms: $m.total_ms, ferry_rss_mib: $moved[0].ferry_rss_mib,
            connections_lost: $window[0].connections_lost, wrong_answers: $window[0].wrong_answers
        }' | tee -a "$scratch/rows" | jq -r '
        "    run \(.run)  pause \(.pause_ms | round) ms, frozen \(.frozen_ms | round): \(.carried) taken out \(.take_ms | round), CRIU dumps \(.criu_dump_ms | round), restores \(.criu_restore_ms | round), they land \(.land_ms | round), all wake \(.wake_ms | round), the rest \(.rest_ms | round)"'
    next=$from from=$to to=$next
}

connections() {
    local count run busy rst
    crowds=() crowd_pids=() crowd_fds=()
    memory=16
    prepare
    cp -r "$here/bench.d" "$shared/bench.d"
    : >"$scratch/rows"
    : >"$scratch/lost"
    for count in ${counts:-$COUNTS}; do
        printf '\n  %s connections and ten more\n' "$count"
        crowds=()
        EDIT_MORE='| .process.rlimits = [{type: "RLIMIT_NOFILE", soft: 16384, hard: 16384}]' container_anew runc
        wire_watch
        busy=$((count / BUSY))
        [ $busy = 0 ] || crowd_start busy "$busy" 20ms
        [ "$count" = 0 ] || crowd_start idle "$((count - busy))" 10s
        probe_start client "$address:7000" --connections 10 --every 2ms --give-up 2m
        probe_steady || die "the client gets no steady answers"
        for ((run = 1; run <= runs; run++)); do connections_run "$count" "$run"; done
        crowd_await
        # Whoever hangs up with an answer on its way gets a RST.
        wire_end
        rst=$(wire_count tcp-rst)
        crowd_end
        probe_end 2>/dev/null || true
        crowd_lost | jq -c --argjson rst "$rst" --argjson dropped "$(wire_dropped)" '. + {rst: $rst, dropped: $dropped}' >>"$scratch/lost"
        [ -z "$json" ] || jq -s . "$scratch/rows" >"$json"
    done
    echo
    jq -s -r '
        def median: sort | (.[((length - 1) / 2) | floor] + .[(length / 2) | floor]) / 2;
        def of(f): map(f) | median;
        def row: {n: .[0].connections, pause: of(.pause_ms), frozen: of(.frozen_ms), dump: of(.criu_dump_ms),
            restore: of(.criu_restore_ms), take: of(.take_ms), land: of(.land_ms), wake: of(.wake_ms), rest: of(.rest_ms)};
        def line(what; f): [(what | . + " " * (24 - length)), (.[] | f)] | join("  ");
        def number: . * 10 | round / 10 | tostring | " " * (9 - length) + .;
        . as $all | (group_by(.connections) | map(row)) as $rows | $rows[0] as $least
        | $rows | line("milliseconds with"; .n | number),
        ({"  pause": "pause", "  frozen": "frozen", "    taken out": "take", "    CRIU dumps": "dump", "    CRIU restores": "restore",
            "    they land": "land", "    all wake": "wake", "    the rest": "rest"} | to_entries[] as $e
            | $rows | line($e.key; .[$e.value] | number)),
        "  each of the \($rows[-1].n) adds to the pause: \(($rows[-1].pause - $least.pause) * 1000 / ([$rows[-1].n - $least.n, 1] | max) | number) microseconds",
        "  Ferry'\''s own memory: at most \($all | map(.ferry_rss_mib.source) | max) MiB on the source, \($all | map(.ferry_rss_mib.destination) | max) MiB on the destination"' "$scratch/rows"
    jq -s -r '.[] | "  of \(.connections) connections \(.lost) lost, \(.wrong) wrong answers, \(.rst) RST on the wire (\(.dropped) packets missed)"' "$scratch/lost"
    jq -s -e 'all(.connections_lost == 0 and .wrong_answers == 0)' "$scratch/rows" >/dev/null &&
        jq -s -e 'all(.lost == 0 and .wrong == 0 and .rst == 0 and .dropped == 0)' "$scratch/lost" >/dev/null
}
