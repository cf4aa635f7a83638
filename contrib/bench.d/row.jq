# A row of contrib/bench. $moved and $window are what the tool and the probe said, {} if nothing.
def rounded: if . then . * 10 | round / 10 else null end;

$moved[0] as $m | $window[0] as $w | {
    tool: $tool, run: $run,
    memory_mib: $memory, dirty_pages_per_s: $dirty, content: $content, link_mbit: $link, rtt_ms: $rtt,
    downtime_ms: (if $failed then null else $w.worst_pause_ms end),
    frozen_ms: $m.frozen_ms, criu_ms: $m.criu_ms, total_ms: $m.total_ms, wire_bytes: $m.wire_bytes, bad_pages: $bad,
    connections: $w.connections, connections_lost: $w.connections_lost, wrong_answers: $w.wrong_answers,
    # Of the time in which it was not frozen, how much was missing of the writes that were to be done.
    # The server makes up for 20 ms of any pause.
    slowdown_percent: (if ($tool | startswith("ferry")) and $dirty > 0 and $before.rewrites and $after.rewrites and $m.frozen_ms then
        (($after.at - $before.at - $m.frozen_ms + 20) / 1000 * $dirty) as $due
        | [100 * (1 - ($after.rewrites - $before.rewrites) / $due), 0] | max | rounded else null end),
    ferry_rss_mib: $m.ferry_rss_mib,
    failed: $failed,
    error: (if $failed then $why | split("\n") | map(select(. != "")) | .[-6:] | join("; ")
        | if . == "" then "it gave no reason" else . end else null end),
    probe_late_ms: $w.probe_late_ms }
