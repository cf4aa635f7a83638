//! The wire between two hosts: ssh, unix socket.
