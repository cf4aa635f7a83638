# The last part of contrib/demo: round the world. Sourced by it, after stage.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154  # `net` and `scratch` are stage.sh's

# Three hosts in three networks, of which b and c are 200 ms away from a; a client behind a router
# holds connections. Writes what it saw to the file `world` in `scratch`.
world_round() {
    local address leg from to verify
    stage_up a b@1 c@2 far@3
    lab link b --delay 100
    lab link c --delay 100
    address=$net.50
    export EDIT='.process.args = ["/counter-server", "--memory", "16M"]'
    container_make a counter counter "$address"
    on a ip -n counter route add default via "$net.1"
    container_run a counter
    wait_until 60 answers far "$address" 7000 || die "the server does not answer"
    cat <<TXT

Round the world: a, b and c are in three networks now, b and c each 200 ms away from a. The address
$address means nothing there: it stays on a, which forwards. The client is behind a router.
TXT
    probe_start far "$address:7000" --connections 5 --every 20ms || die "the client cannot connect"
    probe_steady 60 || die "the client gets no steady answers"
    : >"$scratch/legs"
    for leg in "a b" "b c" "c a"; do
        read -r from to <<<"$leg"
        printf '\n%s\n' "root@$from# ferry migrate counter $to"
        probe_mark "$from$to"
        migrate counter "$from" "$to" "$scratch/report" || die "the migration from $from to $to failed"
        probe_steady 60 || die "the client is not answered any more on $to"
        probe_report "$from$to" >"$scratch/window"
        on a ferry migrations counter | sed -n 's/^    /  a: /p'
        jq -r --slurpfile report "$scratch/report" '"  \($report[0].total_ms | round) ms in all, frozen for "
            + "\($report[0].frozen_ms | round) ms; the client: worst pause \(.worst_pause_ms | round) ms, "
            + "\(.connections_lost) connections lost, \(.wrong_answers) wrong answers"' "$scratch/window"
        jq -c --arg from "$from" --arg to "$to" '{ from: $from, to: $to, downtime_ms: .worst_pause_ms }' \
            "$scratch/window" >>"$scratch/legs"
    done
    verify=$(probe_ask verify verify)
    probe_report start >"$scratch/all"
    probe_end || true # what it has to say is in the report
    jq -n --slurpfile legs "$scratch/legs" --slurpfile all "$scratch/all" --argjson verify "$verify" '{
        connections: $all[0].connections, connections_lost: $all[0].connections_lost,
        wrong_answers: $all[0].wrong_answers, answers: $all[0].answers, migrations: $legs,
        bad_pages: ($verify.verify | .bad_pages + .bad_table + .bad_in_threads) }' >"$scratch/world"
    echo
    jq -r '"Round the world: \(.answers) answers, \(.connections_lost) of \(.connections) connections lost, "
        + "\(.wrong_answers) wrong answers."' "$scratch/world"
}
