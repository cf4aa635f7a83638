# shellcheck shell=bash
# What copying a container's files costs: read by contrib/bench, which has `prepare` and the rest,
# and the variables that seem to come from nowhere.
# shellcheck disable=SC2154
#
# Each of three containers has its files on the host's own disk, and changes some of them all the
# time. They move to and fro; before each move rsync copies the same tree to the same place.

# How many small files, how large the large one, and how many of its pages are written every second.
FILES="few:100:4M:200 many:100000:4M:200 large:100:2G:5000"

# fresh_disk HOST: an empty file system at /srv/local/disk. Whoever copies gets one: where many files
# were deleted within minutes, ext4 takes several times as long to make new ones, and the second
# would pay for what the first has left.
fresh_disk() {
    local image device numbers
    image=$(lab root "$1")/srv/local/disk.img
    on "$1" sh -c '! mountpoint -q /srv/local/disk || umount /srv/local/disk; mkdir -p /srv/local/disk'
    rm -f "$image"
    truncate -s 16G "$image"
    mkfs.ext4 -q -F "$image"
    device=$(losetup -f --show "$image")
    numbers=$(lsblk -n -d -o MAJ:MIN "$device" | tr -d ' ')
    # shellcheck disable=SC2016
    on "$1" sh -euc 'rm -f /dev/bench-disk
        mknod -m 600 /dev/bench-disk b "${1%:*}" "${1#*:}"
        mount /dev/bench-disk /srv/local/disk' sh "$numbers" || { losetup -d "$device"; die "no disk for $1"; }
    # It is let go when it is unmounted.
    losetup -d "$device"
}

files_container() { # MANY SIZE RATE
    local d=$shared/$NAME/rootfs/many
    clear_away
    fresh_disk a
    container_make a "$NAME" counter "$address" --arg --files --arg /data --arg --files-size --arg "$2" \
        --arg --files-rate --arg "$3"
    # 2 KB each, in directories of 200.
    # shellcheck disable=SC2016
    perl -e 'my ($d, $n) = @ARGV;
        open(my $random, "<", "/dev/urandom") or die; mkdir $d;
        for my $i (0 .. $n - 1) {
            my $in = "$d/" . int($i / 200);
            mkdir $in unless $i % 200;
            read($random, my $text, 2000);
            open(my $f, ">", "$in/$i") or die "$in/$i: $!";
            print $f $text;
        }' "$d" "$1"
    on a mv "/srv/shared/$NAME" "/srv/local/disk/$NAME"
    container_run a "$NAME" ferry "/srv/local/disk/$NAME"
    wait_until 120 answers client "$address" 7000 || die "the server does not answer"
    from=a to=b
}

# Seconds that rsync takes from disk to disk, with the tree as it is.
rsync_seconds() {
    # shellcheck disable=SC2016
    on "$from" bash -euc 'began=${EPOCHREALTIME/[.,]/}
        # 24: what was there a moment ago was not any more.
        rsync -aHAXS --numeric-ids "/srv/local/disk/$1/rootfs/" "$2:/srv/local/disk/by-rsync/" 2>/run/rsync.log ||
            [ $? = 24 ] || { cat /run/rsync.log >&2; exit 1; }
        ssh "$2" sync -f /srv/local/disk
        echo "$((${EPOCHREALTIME/[.,]/} - began))e-6"' bash "$NAME" "$to"
}

files_run() { # CASE RUN
    local rsync next
    # Under the same client, which takes its part of the processors.
    probe_start client "$address:7000" --connections "$connections" --every 2ms --give-up 10m
    probe_steady || die "the client gets no steady answers"
    fresh_disk "$to"
    rsync=$(rsync_seconds)
    fresh_disk "$to"
    probe_mark move
    migrate "$NAME" "$from" "$to" "$scratch/report" --source-files remove || die "it did not move"
    probe_steady || die "the client gets no steady answers afterwards"
    probe_report move >"$scratch/window"
    bad=$(probe_ask verify verify | jq '.verify | if . then .bad_pages + .bad_table + .bad_in_threads else null end')
    probe_end 2>/dev/null || true
    jq -n -c --arg files "$1" --argjson run "$2" --argjson rsync "$rsync" --argjson bad "$bad" \
        --slurpfile moved "$scratch/report" --slurpfile window "$scratch/window" '
        $moved[0] as $m | $m.files[0] as $first | $m.files[-1] as $last | {
            files: $files, run: $run, downtime_ms: $window[0].worst_pause_ms, frozen_ms: $m.frozen_ms,
            pause_began_ms: $window[0].worst_pause_began_ms,
            freeze_began_ms: ($m.source | map(select(.name == "freeze")) | .[0].at_ms),
            total_ms: $m.total_ms, entries: $first.entries, bytes: $first.bytes,
            copy_s: ($first.ms / 1000), rsync_s: $rsync,
            last_round: $last, connections_lost: $window[0].connections_lost,
            wrong_answers: $window[0].wrong_answers, bad: $bad
        }' | tee -a "$scratch/rows" | jq -r '
        "    run \(.run)  pause \(.downtime_ms | round) ms, frozen \(.frozen_ms | round) ms, total \(.total_ms | round) ms, "
        + "first copy \(.copy_s * 10 | round / 10) s, rsync \(.rsync_s * 10 | round / 10) s; "
        + "in the freeze \(.last_round.entries) files looked at, \(.last_round.read / 1e6 | round) MB read, "
        + "\(.last_round.bytes / 1e6 * 10 | round / 10) MB sent"'
    next=$from from=$to to=$next
}

files() {
    local one many size rate run
    prepare
    : >"$scratch/rows"
    for one in $FILES; do
        IFS=: read -r one many size rate <<<"$one"
        printf '\n  %s: %s files of 2 KB, one of %s of which %s pages are written every second\n' "$one" "$many" "$size" "$rate"
        files_container "$many" "$size" "$rate"
        for ((run = 1; run <= runs; run++)); do files_run "$one" "$run"; done
        [ -z "$json" ] || jq -s . "$scratch/rows" >"$json"
    done
    echo
    jq -s -r '
        def median: sort | (.[((length - 1) / 2) | floor] + .[(length / 2) | floor]) / 2;
        def tenths: . * 10 | round / 10;
        "              files         MB   pause ms     frozen     copy s    rsync s",
        (group_by(.files)[] | [
            (.[0].files | . + " " * (8 - length)), (.[0].entries, (.[0].bytes / 1e6 | round),
            (map(.downtime_ms) | median | round), (map(.frozen_ms) | median | round),
            (map(.copy_s) | median | tenths), (map(.rsync_s) | median | tenths)
            | tostring | " " * (9 - length) + .)] | join("  "))' "$scratch/rows"
    jq -s -e 'all(.connections_lost == 0 and .wrong_answers == 0 and .bad == 0)' "$scratch/rows" >/dev/null
}
