# A table of what the rows of contrib/bench have in common, tool by tool.
#   jq -s -r -f contrib/bench.d/table.jq ROWS

def spaces($n): if $n > 0 then " " * $n else "" end;
def left($n): tostring | . + spaces($n - length);
def right($n): tostring | spaces($n - length) + .;
def tenth: . * 10 | round / 10;
# The middle one; of two the mean.
def median: sort | if length == 0 then null
    else (.[((length - 1) / 2) | floor] + .[(length / 2) | floor]) / 2 end;
def three: if length == 0 then "-" | right(26) else
    [(median | tenth | right(8)), (min | tenth | right(8)), (max | tenth | right(8))] | join(" ") end;

. as $rows
| ($rows | map(.tool) | unique) as $tools
| ("tool" | left(8)) + " runs   pause ms: median      min      max   frozen: median      min      max"
    + "    total: median      min      max  lost wrong failed",
  ($tools[] as $tool
    | ($rows | map(select(.tool == $tool))) as $own
    | ($own | map(select(.failed | not))) as $done
    | ($tool | left(8)) + ($own | length | right(5))
        + "  " + ($done | map(.downtime_ms) | three | right(32))
        + ($done | map(.frozen_ms) | three | right(32))
        + ($done | map(.total_ms) | three | right(32))
        + ($own | map(.connections_lost) | add | right(6))
        + ($own | map(.wrong_answers) | add | right(6))
        + ($own | map(select(.failed)) | length | right(7))),
  # How many times shorter Ferry's are.
  (($rows | map(select(.tool == "ferry" and (.failed | not)))) as $ferry
    | $tools[] | select(. != "ferry") as $tool
    | ($rows | map(select(.tool == $tool and (.failed | not)))) as $own
    | select(($own | length) > 0 and ($ferry | length) > 0)
    | ["downtime_ms", "frozen_ms", "total_ms"]
    | map(. as $key | ([$own[][$key]] | median) / ([$ferry[][$key]] | median) | tenth) as $ratio
    | "\($tool) takes \($ratio[0]) times Ferry's pause, \($ratio[1]) times its freeze, \($ratio[2]) times its time in all (medians)")
