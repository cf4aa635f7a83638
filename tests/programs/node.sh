# WebSockets, which last. It uses io_uring where it can; migratable denies it that.
# shellcheck shell=bash disable=SC2016,SC2034,SC2154  # what tests/programs.sh sets and reads
name='Node.js, WebSocket, migratable'
how='8 WebSockets, each with a sum that the server keeps; a timer of the server ticks on'
package=nodejs
node_made() {
    make_container '.annotations["org.ferry.migratable"] = "true"' <<'TXT' || return 1
#!/bin/sh
exec node /server.mjs >/log 2>&1
TXT
    cp tests/programs/websocket_server.mjs "$(rootfs a)/server.mjs" && cp tests/programs/websocket_client.mjs "$shared" &&
        start_container 8000
}
asks_by_websocket() {
    loaded node /srv/shared/websocket_client.mjs "ws://$address:8000/" 8
    wait_until 30 said ready || { cat "$scratch/load" "$scratch/load.err"; return 1; }
}
needed "it starts" node_made || return 0
needed "clients ask by WebSocket" asks_by_websocket || return 0
moves
asking_ends
check "the server's timer ticked on" asked '.ticks > 10'
