# What the ways to move a container have in common, on the source: contrib/bench.d/by-TOOL. Sourced.
# Runs in a host of the lab, as root; bundle and root file system lie on storage that both hosts see.
#
# usage of each: by-TOOL CONTAINER DESTINATION BUNDLE ADDRESS MAC LINK
#   LINK    the link's Mbit/s, 0 for no limit
#
# Each is as good as a careful administrator would make it: images lie in memory, one ssh connection
# is opened before anything stops, what goes over a slow link is compressed, the namespace there is
# made beforehand, and nothing reaches its address while no container is behind it (the kernel would
# answer with RST). The only output is one line of JSON.
# shellcheck shell=bash
set -euo pipefail
export LC_ALL=C # EPOCHREALTIME has a decimal point

# shellcheck disable=SC2034  # not all of them use all of it
name=$1 destination=$2 bundle=$3 address=$4 mac=$5 link=$6
here=$(dirname "$(readlink -f "$0")")
images=/run/bench.$name
SSH=(ssh -o ControlPath="/run/bench.%n.ssh")

now_us() { echo "${EPOCHREALTIME/./}"; }
# A command there, that never reads our input. There it is given as one line to a shell.
there() { "${SSH[@]}" -n "$destination" "$(printf '%q ' "$@")" >&2; }
# there_by ACTION …: one of there.sh
there_by() { there "$here/there.sh" "$name" "$address" "$@"; }

hang_up() { "${SSH[@]}" -O exit "$destination" 2>/dev/null || true; }
trap hang_up EXIT

# What can be done while it runs.
prepare() {
    began=$(now_us)
    "${SSH[@]}" -M -f -n -N -o ControlPersist=no "$destination" >/dev/null 2>&1
    there_by prepare "$images" "$mac"
    rm -rf "$images"
    mkdir -p "$images/work"
}

freeze_begins() { frozen=$(now_us); }
it_runs() { running=$(now_us); }

# Where compressing is faster than sending.
is_slow() { [ "$link" != 0 ] && [ "$link" -lt 1000 ]; }

copy_images() { # DIRECTORY [OPTIONS of rsync]
    rsync -a "${@:2}" -e "${SSH[*]}" "$1/" "$destination:$1/" >&2
}

# runc checkpoint into $images/last. It ends the container here: from then on its address must not
# be seen here any more.
checkpoint() { # OPTIONS
    mkdir -p "$images/last"
    runc checkpoint --tcp-established --image-path "$images/last" --work-path "$images/work" "$@" "$name" >&2 ||
        failed "$images/work/dump.log" "runc checkpoint"
}

# The last that CRIU says is rarely why: its errors are.
failed() { # LOG WHAT
    { grep -aE 'Error|Warn' "$1" || tail -n 5 "$1"; } 2>/dev/null | tail -n 20 >&2 || true
    echo "$2 failed" >&2
    exit 1
}

# Whether the kernel keeps track of what is written, without which CRIU copies nothing beforehand.
has_soft_dirty() { criu check --feature mem_dirty_track >/dev/null 2>&1; }

finish() {
    ip netns del "$name"
    rm -rf "$images"
    printf '{"frozen_ms": %d, "total_ms": %d}\n' $(((running - frozen) / 1000)) $((($(now_us) - began) / 1000))
}
