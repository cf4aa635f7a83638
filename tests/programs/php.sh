# PHP with its opcache behind nginx. Its just-in-time compiler's memory is such as CRIU cannot begin in:
# that is turned off.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='PHP-FPM with opcache, behind nginx'
how='8 kept-alive connections, a page computed for each request; opcache says that it is on'
php=$(basename "$(echo "$image"/usr/sbin/php-fpm8*)")
package=${php/php-fpm/php}-fpm
php_made() {
    make_container <<TXT || return 1
#!/bin/sh
mkdir -p /run/php
nginx -c /nginx.conf || exit 1
exec $php -F -R -y /fpm.conf -d opcache.jit_buffer_size=${JIT:-0} >/log 2>&1
TXT
    cat >"$(rootfs a)/nginx.conf" <<'TXT'
user root;
worker_processes 2;
pid /run/nginx.pid;
error_log /log.nginx;
events {}
http {
    access_log off;
    keepalive_requests 1000000000;
    server {
        listen 80;
        root /www;
        location / {
            include /etc/nginx/fastcgi_params;
            fastcgi_param SCRIPT_FILENAME /www/page.php;
            fastcgi_read_timeout 60s;
            fastcgi_pass unix:/run/php/fpm.sock;
        }
    }
}
TXT
    cat >"$(rootfs a)/fpm.conf" <<'TXT'
[global]
error_log = /dev/stderr
[www]
user = root
group = root
listen = /run/php/fpm.sock
pm = dynamic
pm.max_children = 12
pm.start_servers = 4
pm.min_spare_servers = 2
pm.max_spare_servers = 6
TXT
    mkdir "$(rootfs a)/www" || return 1
    cat >"$(rootfs a)/www/page.php" <<'TXT'
<?php
$number = (int)($_GET["n"] ?? 0);
echo isset($_GET["n"]) ? "$number " . $number * $number : json_encode(opcache_get_status(false)["opcache_enabled"]);
TXT
    start_container 80
}
opcache_is_on() { on client python3 -c 'import sys, urllib.request
sys.exit(urllib.request.urlopen(sys.argv[1]).read() != b"true")' "http://$address/"; }
needed "it starts" php_made || return 0
check "its opcache is on" opcache_is_on
needed "clients ask for pages" asks http --connections 8 --path '/?n=NUMBER' || return 0
moves
asking_ends
check "its opcache is still on" opcache_is_on
