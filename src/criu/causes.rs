//! Known causes of CRIU's failures, told by the words of its errors.
//!
//! Most of these are found before anything is touched, and refused: what comes here has begun since
//! then, or shows to CRIU alone.

/// What an error line has in it, all of these, and what to do about it.
type Cause = (&'static [&'static str], &'static str);

/// The first that fits a line counts. Words: CRIU 4.2's sources.
const CAUSES: &[Cause] = &[
    // criu/sk-inet.c, sk-packet.c, sk-unix.c, sk-netlink.c, sk-queue.c; soccr/soccr.c
    (
        &["Unsupported proto 262"],
        "it uses Multipath TCP: start Go programs with GODEBUG=multipathtcp=0, others where the sysctl \
         net.mptcp.enabled is 0",
    ),
    (
        &["Can't bind packet socket"],
        "it listens to an interface by its number (AF_PACKET), which is another one over there: end the \
         program (tcpdump, a DHCP client …) and try again",
    ),
    (
        &["Can't bind inet socket back"],
        "it has a TCP connection at an address that cannot be had over there, as a link-local one \
         (fe80::): end the connection, and try again",
    ),
    (
        &["write queue on an in-flight socket"],
        "a client of a unix socket waits to be accepted and has sent something: try again when the server \
         is less busy",
    ),
    (
        &["closed in-flight socket"],
        "a client of a unix socket has gone before it was accepted: try again when the server is less busy",
    ),
    (
        &["In-flight connection on"],
        "a client of a unix socket waits to be accepted: try again when the server is less busy",
    ),
    (
        &["Control messages in queue"],
        "a datagram with credentials or a time stamp (SO_PASSCRED, SO_TIMESTAMP) waits in a unix socket: \
         try again when the program has read it",
    ),
    (
        &["half of stream unix connection"],
        "somebody outside of the container has the other end of a unix socket, as a process that came by \
         `exec` or the host's log: end that first",
    ),
    (
        &["name-less external socket"],
        "somebody outside of the container has the other end of a unix socket: end that first",
    ),
    (&["The socket has data to read"], "a netlink socket has unread messages: try again"),
    // criu/fsnotify.c, eventpoll.c, file-lock.c, files-reg.c, files-ext.c, filesystems.c
    (
        &["Can't dump that handle"],
        "it watches (inotify, fanotify) what CRIU cannot find by a name, as a deleted file: have the \
         program end the watch, or start it anew over there",
    ),
    (
        &["Can't find suitable path for handle"],
        "it watches (inotify, fanotify) a deleted file in a tmpfs: have the program end the watch",
    ),
    (
        &["Dump eventpoll", "failed"],
        "two processes share an epoll since a fork: have each process make its own",
    ),
    (
        &["Can not set", "lock!"],
        "somebody else holds a lock that the container has had on a file which both hosts see: have the \
         file on storage that is copied",
    ),
    (
        &["Can't dump ghost file"],
        "a large file was deleted and is open still, or mapped (a program that was replaced): have it \
         closed, or start the program again",
    ),
    (
        &["Can't create link remap"],
        "a file was deleted that has another name still, and there is no room for one more: have it closed",
    ),
    (
        &["Can't lookup mount=", "for fd="],
        "it has a file open that lies outside of its mounts: one inherited from whoever started it, or a \
         message queue; have the program close it",
    ),
    (
        &["Open files on overmounted mounts"],
        "it has a file open over whose place something was mounted since: have it closed",
    ),
    (
        &["mqueue isn't empty"],
        "there are message queues (mq_open) in it: have the program remove them",
    ),
    (
        &["Can't open file", "/task/", "on restore"],
        "it has a file of a thread below /proc open: have the program close it, and try again",
    ),
    (
        &["Can't open file", "on restore"],
        "a file that it has open is not there on the destination, or is another one",
    ),
    (
        &["Can't dump file", "of that type"],
        "CRIU does not know what it has open there: have it closed",
    ),
    (
        &["has bad size", "(expect"],
        "a file that it has open or mapped is not the same on the destination",
    ),
    (&["packetized mode for pipes"], "it has a pipe with O_DIRECT: have it closed"),
    // criu/mount.c, mount-v2.c, namespaces.c
    (
        &["Failed to copy sharing"],
        "it has a mount that is shared both ways (rshared): mount it rslave or rprivate",
    ),
    (
        &["Nested mount namespaces are not supported"],
        "a program in it has made a mount namespace of its own: end that program first",
    ),
    (
        &["Can't dump nested"],
        "a program in it has made a namespace of its own: end that program first",
    ),
    (
        &["doesn't have a proper root mount"],
        "it has a mount that CRIU cannot make again: as a volume in config.json Ferry can carry it",
    ),
    (
        &["Unable to dump a file system"],
        "it has mounted a file system that CRIU cannot carry: have it unmounted first",
    ),
    // criu/seize.c, cr-dump.c, pstree.c, tty.c, seccomp.c; compel/src/lib
    (
        &["Unseizable non-zombie"],
        "that process was not stopped with the others, or is being traced: it may be in a control group \
         beside that of the container's first process (systemd), or have a debugger",
    ),
    (
        &["found while seizing"],
        "that process is being traced (strace, a debugger), or has just ended: end the tracer, and try \
         again",
    ),
    (
        &["A session leader of", "outside of its pid namespace"],
        "that process came from outside (`exec`) and is none of the container's own: end it first",
    ),
    (
        &["ctty inheritance detected"],
        "a shell such as dash has a job in the foreground of a terminal: end the job, or start it from \
         bash",
    ),
    (
        &["Found dangling tty"],
        "somebody outside of the container has the other end of a terminal: end that first",
    ),
    (
        &["Can't inject syscall blob"],
        "that process has shared executable memory below its program, where CRIU begins and cannot write; \
         PHP: opcache.jit_buffer_size=0",
    ),
    (
        &["Can't restore the original data with poke"],
        "that process has shared executable memory below its program, where CRIU begins and cannot write; \
         PHP: opcache.jit_buffer_size=0",
    ),
    (
        &["create_page_pipe", "Can't allocate"],
        "it has reserved more address space than CRIU can look through: let it reserve less (MariaDB: \
         --innodb-buffer-pool-size-max)",
    ),
    (&["has uprobes vma"], "somebody on this host traces it by uprobes (perf, bpftrace): end that"),
    (
        &["No space left on device"],
        "there was no room for it: see to the memory and the disks of that host",
    ),
    (&["Cannot allocate memory"], "there was no memory for it on that host"),
];

/// Returns what to do about the first of these lines of which that is known. CRIU's first error is mostly the
/// cause of the others.
pub fn hint<'a>(lines: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    let about = |line: &str| {
        let fits = |(words, _): &&Cause| words.iter().all(|word| line.contains(word));
        CAUSES.iter().find(fits).map(|(_, hint)| *hint)
    };
    lines.into_iter().find_map(about)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as they were met.
    #[test]
    fn causes_are_known_by_their_lines() {
        for (line, word) in [
            (
                "(00.057) Error (criu/sk-inet.c:137): inet: Unsupported proto 262 for socket 5a3c",
                "multipathtcp=0",
            ),
            ("(00.2)      1: Error (criu/file-lock.c:661): Can not set ofd lock!", "lock"),
            ("(00.2)      6: Error (criu/file-lock.c:628): Can not set flock!", "lock"),
            (
                "(00.2)      1: Error (criu/sk-packet.c:495): packet: Can't bind packet socket: No such device",
                "AF_PACKET",
            ),
            (
                "(00.2)      1: Error (soccr/soccr.c:499): Can't bind inet socket back: Invalid argument",
                "fe80::",
            ),
            (
                "(00.2)      1: Error (criu/files-reg.c:2353): Can't open file proc/1/task/6/stat on restore: No such file or directory",
                "of a thread",
            ),
            (
                "(00.2)      1: Error (criu/files-reg.c:2353): Can't open file srv/x on restore: No such file or directory",
                "not there on the destination",
            ),
            (
                "(00.2) Error (criu/mount-v2.c:897): mnt-v2: Failed to copy sharing from 23: to 21: Invalid argument",
                "rshared",
            ),
            (
                "(00.2) Error (compel/src/lib/infect.c:261): Unseizable non-zombie 10757 found, state S, err -1/10",
                "control group",
            ),
            ("(10.1) Error (criu/seize.c:335): zombie 9433 (comm ) found while seizing", "traced"),
            (
                "(00.1) Error (criu/tty.c:2281): tty: ctty inheritance detected sid/pgrp 1, no PTY peer with sid/pgrp needed",
                "dash",
            ),
            (
                "(00.1) Error (criu/files-reg.c:1790): Can't lookup mount=241 for fd=4 path=/q",
                "outside of its mounts",
            ),
            ("(00.1) Error (criu/filesystems.c:650): mqueue isn't empty", "message queues"),
            (
                "(00.1) Error (criu/files-reg.c:1031): Can't dump ghost file /big of 113123328 size, increase limit",
                "replaced",
            ),
            (
                "(00.1) Error (criu/sk-unix.c:506): unix: Non-empty write queue on an in-flight socket 0x5a",
                "try again",
            ),
            (
                "(00.1) Error (criu/sk-queue.c:144): skqueue: Control messages in queue, not supported",
                "SO_PASSCRED",
            ),
            ("(00.1) Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle", "inotify"),
            (
                "(00.1) Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name: /run/s; peer name: (null)",
                "exec",
            ),
            (
                "(00.1) Error (criu/cr-dump.c:1703): Dump eventpoll (pid: 14987) failed with -1",
                "epoll",
            ),
            (
                "(00.1) Error (compel/src/lib/ptrace.c:100): Can't restore the original data with poke",
                "opcache",
            ),
            (
                "(00.1) Error (criu/page-pipe.c:98): page-pipe: create_page_pipe: Can't allocate 34359811056 bytes",
                "reserved",
            ),
            (
                "(00.1) Error (criu/files-ext.c:98): Can't dump file 3 of that type [100644] (unknown /dev/x)",
                "have it closed",
            ),
        ] {
            let hint = hint([line].into_iter());
            assert!(hint.is_some_and(|hint| hint.contains(word)), "{line}: {hint:?}");
        }
        assert_eq!(hint(["(00.1) Error (criu/x.c:1): who knows"].into_iter()), None);
    }

    #[test]
    fn the_first_that_is_known_counts() {
        let lines = ["mqueue isn't empty", "Control messages in queue"];
        assert!(hint(lines.into_iter()).unwrap().contains("message queues"));
        let lines = ["nobody knows", "Control messages in queue"];
        assert!(hint(lines.into_iter()).unwrap().contains("SO_PASSCRED"));
    }
}
