#!/usr/bin/env bash
# runc restore, with what is needed round it: the command of `there.sh … arrive`.
#
# usage: restore.sh CONTAINER BUNDLE IMAGES [LAZY-ADDRESS LAZY-PORT]
set -euo pipefail
name=$1 bundle=$2 images=$3
lazy=()

# The container must not hold our streams.
restore() {
    runc restore -d --tcp-established --image-path "$images/last" --work-path "$images/work" -b "$bundle" "${lazy[@]}" \
        "$name" </dev/null >/dev/null 2>&1
}
show() { { grep -aE 'Error|Warn' "$1" || tail -n 5 "$1"; } 2>/dev/null | tail -n 20 >&2 || true; }

if [ $# -gt 3 ]; then
    lazy=(--lazy-pages)
    # It is ready when it says so; it stays until all memory is here.
    criu lazy-pages --page-server --address "$4" --port "$5" --images-dir "$images/last" --work-dir "$images/work" \
        --log-file lazy-pages.log --daemon --pidfile "$images/work/lazy.pid" ||
        { show "$images/work/lazy-pages.log"; echo "criu lazy-pages failed" >&2; exit 1; }
fi
restore || { show "$images/work/restore.log"; echo "runc restore failed" >&2; exit 1; }
