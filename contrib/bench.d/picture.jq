# Draws the client's pause against the size of memory, a line a tool, both axes logarithmic.
#   jq -s -r -f contrib/bench.d/picture.jq ROWS >pause.svg
# Of all points it takes those that differ in memory only: the longest such series.

def median: sort | if length == 0 then null
    else (.[((length - 1) / 2) | floor] + .[(length / 2) | floor]) / 2 end;
def tenth: . * 10 | round / 10;
def text($x; $y; $anchor): "<text x=\"\($x | tenth)\" y=\"\($y | tenth)\" text-anchor=\"\($anchor)\"";
# The same in every picture, whoever else is in it.
def colour: {"ferry": "#0b6e4f", "ferry-postcopy": "#57b894", "script": "#b3261e", "page-server": "#d9822b",
    "lazy-pages": "#6a51a3", "podman": "#3a6ea5"}[.] // "#555555";
def mib: if . >= 1024 then "\(. / 1024 | tenth) GiB" else "\(.) MiB" end;
def ms: if . >= 1000 then "\(. / 1000) s" else "\(.) ms" end;

86 as $left | 640 as $right | 74 as $top | 430 as $bottom
| map(select((.failed | not) and .downtime_ms > 0))
| group_by([.dirty_pages_per_s, .content, .link_mbit, .rtt_ms])
| (max_by([(map(.memory_mib) | unique | length), length]) // []) as $rows
| ($rows | group_by(.tool) | map({
    tool: .[0].tool,
    points: (group_by(.memory_mib) | map({memory: .[0].memory_mib, ms: (map(.downtime_ms) | median)})) })) as $tools
| ([$tools[].points[].memory] | unique) as $memories
| if ($tools | length) == 0 then error("nothing to draw: no move succeeded") else . end
# Whole decades, and a little air at both sides.
| ([$tools[].points[].ms] | {from: (min | log10 | floor), to: (max | log10 | floor + 1)}) as $y
| ($memories | {from: ((min | log2) - 0.3), to: ((max | log2) + 0.3)}) as $x
| def at_x: $left + (log2 - $x.from) / ($x.to - $x.from) * ($right - $left);
  def at_y: $bottom - (log10 - $y.from) / ($y.to - $y.from) * ($bottom - $top);
# Names at the ends of their lines, pushed down where they would lie on each other.
($tools | map(. + {colour: (.tool | colour), end: (.points[-1].ms | at_y)}) | sort_by(.end)
    | reduce .[] as $tool ([]; . + [$tool + {label: ([$tool.end, ((.[-1].label // -100) + 19)] | max)}])) as $lines
| ($rows[0] | "\(.content) memory, \(.dirty_pages_per_s) pages/s written, "
    + (if .link_mbit == 0 then "link without limit" else "\(.link_mbit) Mbit/s" end)
    + (if .rtt_ms > 0 then ", \(.rtt_ms) ms round trip" else "" end)) as $where
| ($rows | group_by([.tool, .memory_mib]) | map(length) | unique | if length == 1 then "\(.[0])" else "\(min) to \(max)" end) as $runs
| "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 800 500\" width=\"800\" height=\"500\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">",
  "<rect width=\"800\" height=\"500\" fill=\"#fff\"/>",
  "\(text($left; 30; "start")) font-size=\"17\" font-weight=\"bold\">The longest pause that a client sees while its server moves</text>",
  "\(text($left; 51; "start")) fill=\"#555\">\($where); \(if $runs == "1" then "one run" else "medians of \($runs) runs" end)</text>",
  # Lines at 1, 2 and 5 of each decade; the first one darker.
  (range($y.from; $y.to + 1) as $decade | (1, 2, 5) as $n | (pow(10; $decade) * $n | round) as $value
    | select($value <= pow(10; $y.to)) | ($value | at_y) as $at
    | "<line x1=\"\($left)\" x2=\"\($right)\" y1=\"\($at | tenth)\" y2=\"\($at | tenth)\" stroke=\"\(if $n == 1 then "#bbb" else "#e6e6e6" end)\"/>",
      "\(text($left - 8; $at + 4.5; "end"))>\($value | ms)</text>"),
  ($memories[] | at_x as $at
    | "<line x1=\"\($at | tenth)\" x2=\"\($at | tenth)\" y1=\"\($top)\" y2=\"\($bottom)\" stroke=\"#e6e6e6\"/>",
      "\(text($at; $bottom + 20; "middle"))>\(mib)</text>"),
  "\(text(($left + $right) / 2; $bottom + 46; "middle")) fill=\"#555\">the container's memory</text>",
  "<text transform=\"translate(22 \(($top + $bottom) / 2)) rotate(-90)\" text-anchor=\"middle\" fill=\"#555\">pause</text>",
  ($lines[]
    | "<polyline fill=\"none\" stroke=\"\(.colour)\" stroke-width=\"2.5\" stroke-linejoin=\"round\" points=\"\([.points[] | "\(.memory | at_x | tenth),\(.ms | at_y | tenth)"] | join(" "))\"/>",
      (.colour as $colour | .points[] | "<circle cx=\"\(.memory | at_x | tenth)\" cy=\"\(.ms | at_y | tenth)\" r=\"4\" fill=\"\($colour)\"><title>\(.memory | mib): \(.ms | tenth) ms</title></circle>"),
      "<line x1=\"\(.points[-1].memory | at_x + 6 | tenth)\" y1=\"\(.end | tenth)\" x2=\"\($right + 10)\" y2=\"\(.label | tenth)\" stroke=\"\(.colour)\" stroke-width=\"0.8\" stroke-dasharray=\"2 3\"/>",
      "\(text($right + 14; .label + 4.5; "start")) fill=\"\(.colour)\" font-weight=\"bold\">\(.tool)</text>"),
  "</svg>"
