//! Dispatch only: pass through, our verbs, or the CRIU shim.

fn main() {}
