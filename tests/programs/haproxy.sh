# In front of nginx, in one container; its admin socket is renamed after it was bound.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='HAProxy before nginx'
how='8 kept-alive connections, a page of 100 kB by its digest; the admin socket answers after each move'
haproxy_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
mkdir -p /run/haproxy
nginx -c /nginx.conf || exit 1
exec haproxy -W -f /haproxy.cfg >/log 2>&1
TXT
    cat >"$(rootfs a)/nginx.conf" <<'TXT'
user root;
worker_processes 2;
pid /run/nginx.pid;
error_log /log.nginx;
events {}
http {
    access_log off;
    server { listen 127.0.0.1:8080; root /www; }
}
TXT
    cat >"$(rootfs a)/haproxy.cfg" <<'TXT'
global
    stats socket /run/haproxy/admin.sock mode 600 level admin
    maxconn 200
defaults
    mode http
    timeout connect 60s
    timeout client 60s
    timeout server 60s
frontend in
    bind :80
    default_backend nginx
backend nginx
    server one 127.0.0.1:8080
TXT
    mkdir "$(rootfs a)/www" && head -c 100000 /dev/urandom >"$(rootfs a)/www/page" || return 1
    digest=$(sha256sum <"$(rootfs a)/www/page" | cut -d ' ' -f 1)
    start_container 80
}
# shellcheck disable=SC2016
admin() {
    on "$from" ferry exec haproxy python3 -c 'import socket
s = socket.socket(socket.AF_UNIX); s.connect("/run/haproxy/admin.sock")
s.sendall(b"show info\n"); print(s.makefile().read())' >"$scratch/info" && grep -q '^CurrConns: ' "$scratch/info"
}
needed "it starts" haproxy_made || return 0
needed "clients load a page" asks http --connections 8 --path /page --sha256 "$digest" || return 0
check "its admin socket answers" admin
check "it can go" on "$from" ferry check "$program" "$to"
for time in first second third; do
    check "it moves the $time time" move
    check "its admin socket answers" admin
done
asking_ends
