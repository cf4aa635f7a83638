# A picture of a migration in text, out of the report that `ferry migrate --json` ends with.
#   jq -r --arg from a --arg to b --arg block '#' -f contrib/timeline.jq REPORT
# A mark that this does not know is shown by its own name.

def width: 36;
def times($n): [range(0; $n)] | map($block) | join("");
def blanks($n): [range(0; $n)] | map(" ") | join("");
def left($n): . + blanks([$n - length, 0] | max);
def right($n): blanks([$n - length, 0] | max) + .;
def ms: (. * 10 | round / 10 | tostring) | if contains(".") then . else . + ".0" end;

# One line: words, milliseconds, and a bar that lies where it lies between $start and $stop.
def row($words; $since; $until; $start; $stop):
    (width / ([$stop - $start, 0.001] | max)) as $scale
    | ((($since - $start) * $scale) | round) as $at
    | ([(($until - $start) * $scale | round) - $at, 1] | max) as $long
    | "  " + ($words | left(46)) + (($until - $since) | ms | right(8)) + " ms  "
        + blanks([$at, width - 1] | min) + times($long);

# What happens in the time that ends with a mark.
def ending($from; $to): {
    "frozen, fence closed": "\($from): stop it, hold its packets",
    "connections are taken out": "\($from): take the connections out",
    "dumped": "\($from): take down its state (CRIU)",
    "images are sent": "\($from) to \($to): the state",
    "last page before the commit is sent": "\($from) to \($to): the last pages of memory",
    "last page is sent": "\($from) to \($to): the last pages of memory",
    "destination has restored": "\($to): build it up again (CRIU)",
    "committed": "now \($to) owns it, for good",
    "runs there": "\($to): open its network, let it run"
};

. as $report
| ($report.source | map({key: .name, value: .at_ms}) | from_entries) as $at
| ($report.source[-1].at_ms) as $stop
| ($at["freeze"]) as $freeze
| ($at["runs there"]) as $runs
| row("\($from): look at the container"; 0; $at["connect"]; 0; $stop),
  row("\($from), \($to): check that it can be done"; $at["connect"]; $at["prepare"]; 0; $stop),
  row("\($from) to \($to): copy its memory while it runs"; $at["prepare"]; $freeze; 0; $stop),
  row("FROZEN"; $freeze; $runs; 0; $stop),
  row("\($from): clear away; it runs on \($to)"; $runs; $stop; 0; $stop),
  "  the freeze, closer:",
  ([$report.source[] | select(.at_ms >= $freeze and .at_ms <= $runs)] as $marks
    | range(1; $marks | length)
    | row("  " + (ending($from; $to)[$marks[.].name] // $marks[.].name);
        $marks[. - 1].at_ms; $marks[.].at_ms; $freeze; $runs))
