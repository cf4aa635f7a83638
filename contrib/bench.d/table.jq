# A table of the rows of contrib/bench: medians, point by point and tool by tool.
#   jq -s -r -f contrib/bench.d/table.jq ROWS

def spaces($n): if $n > 0 then " " * $n else "" end;
def left($n): tostring | . + spaces($n - length);
def right($n): (if . == null then "-" else tostring end) | spaces($n - length) + .;
# Small ones with a digit more.
def short: if . == null then null elif . < 10 then . * 10 | round / 10 else round end;
# The middle one; of two the mean.
def median: map(select(. != null)) | sort | if length == 0 then null
    else (.[((length - 1) / 2) | floor] + .[(length / 2) | floor]) / 2 end;
def sum: map(. // 0) | add;

def point: [.memory_mib, .dirty_pages_per_s // 0, .content // "random", .link_mbit // 0, .rtt_ms // 0];
# In the order in which they were measured.
def groups(f): reduce .[] as $row ([]; ($row | f) as $key
    | (map(.key == $key) | index(true)) as $at
    | if $at == null then . + [{key: $key, rows: [$row]}] else .[$at].rows += [$row] end);

"     MiB pages/s content  Mbit/s  rtt  tool            runs  pause ms     min     max  frozen   total  MiB sent  lost wrong   bad failed  x Ferry's pause",
(groups(point)[] | .key as $key | .rows
    | (map(select(.tool == "ferry" and (.failed | not)).downtime_ms) | median) as $ferry
    | groups(.tool)[] | .key as $tool | .rows as $all
    | ($all | map(select(.failed | not))) as $done
    | ($done | map(.downtime_ms)) as $pauses
    | [ ($key[0] | right(8)), ($key[1] | right(7)), ($key[2] | left(7)),
        (if $key[3] == 0 then "-" else $key[3] end | right(7)), ($key[4] | right(4)), "",
        ($tool | left(14)), ($all | length | right(5)),
        ($pauses | median | short | right(9)), ($pauses | min | short | right(7)), ($pauses | max | short | right(7)),
        ($done | map(.frozen_ms) | median | short | right(7)), ($done | map(.total_ms) | median | short | right(7)),
        ($done | map(.wire_bytes) | median | if . then . / 1048576 | short else null end | right(9)),
        ($all | map(.connections_lost) | sum | right(5)), ($all | map(.wrong_answers) | sum | right(5)),
        ($all | map(.bad_pages) | sum | right(5)), ($all | map(select(.failed)) | length | right(6)),
        (($pauses | median) as $own
            | if $tool != "ferry" and $ferry and $own then $own / $ferry | short else "" end | right(16))
      ] | join(" ")),
# How much Ferry slows the container down, wherever that could be told.
(map(select(.slowdown_percent != null)) | groups(.tool)[]
    | "\(.key): kept from \(.rows | map(.slowdown_percent) | median | . * 10 | round / 10) % of its writes while not frozen (median of \(.rows | length))"),
(map(select(.ferry_rss_mib != null)) | if length > 0 then
    "Ferry's own memory: at most \(map(.ferry_rss_mib.source) | max) MiB on the source, \(map(.ferry_rss_mib.destination) | max) MiB on the destination"
    else empty end),
# What grows with memory, and how much of that is CRIU's own.
(map(select(.criu_ms != null and (.failed | not))) | groups([.tool, (point | .[1:])])[] | .key[0] as $tool
    | (.rows | groups(.memory_mib) | map({memory: .key,
        pause: .rows | map(.downtime_ms) | median,
        criu: .rows | map(.criu_ms.dump + .criu_ms.restore) | median}) | sort_by(.memory))
    | select(length > 1)
    | "\($tool): from \(.[0].memory) to \(.[-1].memory) MiB the pause grows by \(.[-1].pause - .[0].pause | round) ms, CRIU's dump and restore by \(.[-1].criu - .[0].criu | round)"),
# The reasons, each once.
(map(select(.error != null) | "\(.tool) failed: \(.error)") | unique[])
