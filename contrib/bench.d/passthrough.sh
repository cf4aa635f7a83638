#!/usr/bin/env bash
# What going through ferry costs over calling runc: `state` of a container that does not exist,
# directly and through ferry in turn, so that both see the same weather. Prints medians.
#
# usage: contrib/bench.d/passthrough.sh [FERRY [ROUNDS]]    (ferry of a release build; needs runc)
set -euo pipefail
export LC_ALL=C # EPOCHREALTIME has a decimal point

ferry=${1:-target/release/ferry} rounds=${2:-200}
runc=$(command -v runc) || { echo "passthrough: runc is not in PATH" >&2; exit 1; }
[ -x "$ferry" ] || { echo "passthrough: no $ferry; try cargo build --release" >&2; exit 1; }
root=$(mktemp -d)
trap 'rm -r "$root"' EXIT

# Microseconds that a command takes.
micros() {
    local start=$EPOCHREALTIME
    "$@" >/dev/null 2>&1 || true
    local end=$EPOCHREALTIME
    echo $((${end/./} - ${start/./}))
}
median() { sort -n "$root/$1" | sed -n "$((rounds / 2 + 1))p"; }

for verb in state start; do
    : >"$root/runc"; : >"$root/ferry"; : >"$root/over"
    for _ in $(seq "$rounds"); do
        direct=$(micros "$runc" --root "$root/r" "$verb" nobody)
        through=$(micros "$ferry" --root "$root/r" "$verb" nobody)
        echo "$direct" >>"$root/runc"
        echo "$through" >>"$root/ferry"
        echo $((through - direct)) >>"$root/over"
    done
    printf '%-6s runc %6d us   ferry %6d us   difference of a pair %6d us   (medians of %d)\n' \
        "$verb" "$(median runc)" "$(median ferry)" "$(median over)" "$rounds"
done
