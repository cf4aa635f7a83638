# As Debian ships it, but without io_uring, which migratable denies it.
# shellcheck shell=bash disable=SC2034,SC2154  # what tests/programs.sh sets and reads
name='MariaDB'
how='8 connections move money: each committed transfer is in the ledger, and it gives the balances'
package=mariadb-server
mariadb_made() {
    make_container <<'TXT' || return 1
#!/bin/sh
mkdir -p /run/mysqld
exec mariadbd --user=root --bind-address=0.0.0.0 >/log 2>&1
TXT
    inside sh -c 'rm -rf /var/lib/mysql && mariadb-install-db --user=root --skip-test-db' || return 1
    cat >"$(rootfs a)/bank.sql" <<'TXT'
create database bank;
create table bank.account (id int primary key, balance bigint not null) engine = innodb;
create table bank.ledger (id bigint auto_increment primary key, a int, b int, amount int, key (a), key (b)) engine = innodb;
TXT
    seq 0 999 | sed 's/.*/insert into bank.account values (&, 0);/' >>"$(rootfs a)/bank.sql"
    echo "create user bank identified by 'bank'; grant all on bank.* to bank;" >>"$(rootfs a)/bank.sql"
    # Of 8 TiB of address space that it would reserve.
    printf '[mariadbd]\ninnodb_buffer_pool_size_max = 256M\ninnodb_use_native_aio = 0\n' \
        >"$(rootfs a)/etc/mysql/mariadb.conf.d/99-migratable.cnf"
    start_container 3306 && on a ferry exec mariadb sh -c 'mariadb </bank.sql'
}
needed "it starts" mariadb_made || return 0
needed "clients move money" asks mariadb --connections 8 || return 0
moves
asking_ends
check "all $(asked .committed) transfers are in the ledger" asked '.committed == .ledger'
check "the balances are those of the ledger" asked '.balances == 0 and .sum == 0'
