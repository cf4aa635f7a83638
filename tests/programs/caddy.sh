# A server in Go, which listens by Multipath TCP where it is told so.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='Caddy (Go), listening for MPTCP'
how='4 kept-alive connections, a file of 3 MB by its digest'
caddy_made() {
    make_container '.process.env += ["GODEBUG=multipathtcp=2", "HOME=/root"]' <<'TXT' || return 1
#!/bin/sh
exec caddy file-server --root /www --listen :80 >/log 2>&1
TXT
    mkdir "$(rootfs a)/www" && head -c 3000000 /dev/urandom >"$(rootfs a)/www/file" || return 1
    digest=$(sha256sum <"$(rootfs a)/www/file" | cut -d ' ' -f 1)
    start_container 80
}
needed "it starts" caddy_made || return 0
needed "clients load the file" asks http --path /file --sha256 "$digest" || return 0
moves
asking_ends
