# A picture of a migration, out of the report that `ferry migrate --report` writes: where the container
# runs, and what the downtime is made of. `contrib/demo --svg FILE` draws one.
#   jq -r --arg from a --arg to b -f contrib/picture.jq REPORT >docs/migration.svg

def width: 840;
def left: 150;
def right: width - 20;
def row: 26;

def escape: gsub("&"; "&amp;") | gsub("<"; "&lt;") | gsub(">"; "&gt;");
def tenth: . * 10 | round / 10 | tostring | if contains(".") then . else . + ".0" end;
def text($x; $y; $class):
    "  <text x=\"\($x)\" y=\"\($y)\"\(if $class == "" then "" else " class=\"\($class)\"" end)>\(escape)</text>";

# A bar from one moment to another, where the panel shows those from $start to $until.
def bar($y; $from; $to; $start; $until; $class):
    ((right - left) / ($until - $start)) as $scale
    | (left + ($from - $start) * $scale) as $x
    | ([($to - $from) * $scale, 1.5] | max) as $long
    | "  <rect x=\"\($x | tenth)\" y=\"\($y)\" width=\"\($long | tenth)\" height=\"16\" class=\"\($class)\"/>";

def steps($from; $to): {
    "frozen, fence closed": ["\($from): stop it, hold its packets", "host"],
    "connections are taken out": ["\($from): take out connections", "host"],
    "dumped": ["\($from): checkpoint (CRIU)", "host"],
    "images are sent": ["\($from) to \($to): its state", "link"],
    "last page before the commit is sent": ["\($from) to \($to): last pages", "link"],
    "last page is sent": ["\($from) to \($to): last pages", "link"],
    "destination has restored": ["\($to): restore (CRIU)", "host"],
    "committed": ["commit: \($to) owns it", "commit"],
    "runs there": ["\($to): open its network", "host"]
};

. as $report
| ($report.source | map({key: .name, value: .at_ms}) | from_entries) as $at
| ($report.source[-1].at_ms) as $stop
| $at["freeze"] as $freeze
| $at["runs there"] as $runs
# The last page goes before the commit or behind it.
| ($at["last page before the commit is sent"] // $at["last page is sent"] // $runs) as $last
| [$report.source[] | select(.at_ms >= $freeze and .at_ms <= $runs)] as $marks
| 176 as $closer
| ($closer + ($marks | length - 1) * row + 14) as $height
| "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 \(width) \($height)\" role=\"img\"",
  "    aria-label=\"One migration from host \($from) to host \($to): the container stands still for \($runs - $freeze | tenth) of \($stop | tenth) ms\">",
  "  <style>",
  "    text { font: 13px sans-serif; fill: #24292f } .title { font-weight: bold } .end { text-anchor: end }",
  "    .in { fill: #fff } .runs { fill: #2da44e } .frozen { fill: #cf222e } .link { fill: #bf8700 }",
  "    .made { fill: #d0d7de } .host { fill: #0969da } .commit { fill: #8250df }",
  "  </style>",
  "  <rect x=\"0.5\" y=\"0.5\" width=\"\(width - 1)\" height=\"\($height - 1)\" rx=\"6\" fill=\"#fff\" stroke=\"#d0d7de\"/>",
  ("ferry migrate: \($stop | tenth) ms in all" | text(16; 24; "title")),
  ("host \($from)" | text(16; 52; "")),
  bar(40; 0; $freeze; 0; $stop; "runs"),
  bar(40; $freeze; $runs; 0; $stop; "frozen"),
  bar(40; $runs; $stop; 0; $stop; "made"),
  ("it runs here" | text(left + 8; 52; "in")),
  ("link" | text(16; 80; "")),
  bar(68; $at["connect"]; $at["prepare"]; 0; $stop; "made"),
  bar(68; $at["prepare"]; $freeze; 0; $stop; "link"),
  bar(68; $at["dumped"]; $last; 0; $stop; "link"),
  ("its memory, round by round, while it runs" | text((left + ((right - left) / $stop) * $at["prepare"] + 8 | round); 80; "in")),
  ("host \($to)" | text(16; 108; "")),
  bar(96; $at["prepare"]; $runs; 0; $stop; "made"),
  bar(96; $runs; $stop; 0; $stop; "runs"),
  ("makes ready, keeps its memory" | text((left + ((right - left) / $stop) * $at["prepare"] + 8 | round); 108; "")),
  ("it runs here" | text(right - 8; 108; "in end")),
  ("Red: the downtime, \($runs - $freeze | tenth) ms" | text(16; 140; "")),
  ("The downtime, closer:" | text(16; $closer - 10; "title")),
  (range(1; $marks | length)
    | . as $i
    | (steps($from; $to)[$marks[$i].name] // [$marks[$i].name, "host"]) as $step
    | ($closer + ($i - 1) * row + 6) as $y
    | ($step[0] | text(16; $y + 13; "")),
      ("\($marks[$i].at_ms - $marks[$i - 1].at_ms | tenth) ms" | text(290; $y + 13; "end")),
      (((right - 300) / ($runs - $freeze)) as $scale
        | "  <rect x=\"\(300 + ($marks[$i - 1].at_ms - $freeze) * $scale | tenth)\" y=\"\($y)\" width=\"\([($marks[$i].at_ms - $marks[$i - 1].at_ms) * $scale, 1.5] | max | tenth)\" height=\"16\" class=\"\($step[1])\"/>")),
  "</svg>"
